"""Qwen-Image: text to image, edit, layered.

Text stands before the images; where prompts differ in length its padding is masked and lies between text and image.
Edit puts the conditioning images behind the made one, and layered makes several images of one size.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import conditioning_notes, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed images [B, N, C] with `img_shapes`, text [B, T, C] and its mask [B, T] or None."""
    tokens = call.tensor("hidden_states", 3).shape[1]
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    (frames, height, width), conditioning = images(call, tokens)
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    mask = call.get("encoder_hidden_states_mask")
    found = CallLayout(grid) if mask is None else mask_text(call, grid, mask)
    return dataclasses.replace(found, notes=conditioning_notes(conditioning))


def images(call: ModelCall, tokens: int, name: str = "img_shapes") -> tuple[tuple[int, int, int], int]:
    """Images in front that share the first one's size, with that size, and the number of tokens behind them.

    Args:
        call: with, under that name: of each sample, the (frames, height, width) of its images, or of its one image.
        tokens: image tokens of each sample.
        name: of the argument.

    Raises:
        DitAccelError: there are none, those of the samples differ, or they stand for another number of tokens.
    """
    shapes = call.get(name)
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise DitAccelError(f"{call.owner} needs {name} with the images of each sample, got {shapes!r}.")
    samples = [sample if isinstance(sample, list) else [sample] for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        raise DitAccelError(
            f"The samples of a batch must have images of the same sizes, got {name}={shapes}; call the pipeline "
            "once for each size."
        )
    frames, (height, width) = 0, samples[0][0][1:]
    for length, *size in samples[0]:
        if size != [height, width]:
            break
        frames += length
    counted = sum(length * rows * columns for length, rows, columns in samples[0])
    if counted != tokens:
        raise DitAccelError(f"{name}={shapes} stand for {counted} image tokens, but the call has {tokens}.")
    return (frames, height, width), tokens - frames * height * width


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=512, text_first=True)


FAMILY = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="Qwen-Image: text to image, edit, layered",
    timestep_scale=1000.0,
)
