"""HiDream-I1 and E1: T5 tokens, Llama tokens and the block's own Llama tokens follow the image; all are attended.

Images that are not square are padded to the model's longest sequence. Padded keys are multiplied by zero, not masked,
so they still weigh in the softmax. They are conditioning tokens of the grid, dense both ways, which keeps the model's
result.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Shape, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W]; or its patches [B, N, C] with `img_sizes` and `hidden_states_masks`."""
    if call.get("hidden_states_masks") is None:
        image = image_of(call, transformer.config.patch_size)
        height, width = call.tensor("hidden_states", 4).shape[2:]
        tokens = image.visual if height == width else transformer.max_seq
    else:
        image = _packed(call)
        tokens = call.length("hidden_states")
    t5, llama = call.length("encoder_hidden_states_t5"), call.get("encoder_hidden_states_llama3")
    # A block sees T5, the last of Llama's chosen layers, and its own layer of Llama.
    text = t5 + 2 * llama[0].shape[-2]
    conditioning = tokens - image.visual
    notes = (f"{conditioning} tokens that pad the image are dense both ways",) if conditioning else ()
    return CallLayout(TokenGrid(*image.shape, text=text, conditioning=conditioning), notes=notes)


def _packed(call: ModelCall) -> TokenGrid:
    sizes = call.get("img_sizes")
    if isinstance(sizes, torch.Tensor):
        sizes = call.once(sizes, torch.Tensor.tolist)
    if len({tuple(size) for size in sizes}) > 1:
        raise DitAccelError(
            f"The images of a batch must have one size, got img_sizes={sizes}; call once for each size."
        )
    return patch_grid((1, *sizes[0]), (1, 1, 1))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 128 tokens of T5, and twice 128 of Llama."""
    patch = transformer["patch_size"]
    rows, columns = transformer["max_resolution"]
    most = rows * columns // patch**2

    def padding(shape: Shape) -> int:
        _, height, width = shape
        if height * width > most and height != width:
            raise DitAccelError(
                f"{height} x {width} tokens cannot be made: an image that is not square has at most {most} tokens."
            )
        return 0 if height == width else most - height * width

    return image_sizes(vae_pixels(vae) * patch, text=384, conditioning=padding)


FAMILY = Family(
    name="hidream",
    transformers=("HiDreamImageTransformer2DModel",),
    attention=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
    layout=layout,
    sizes=sizes,
    summary="HiDream: I1, E1",
    timestep_name="timesteps",
)
