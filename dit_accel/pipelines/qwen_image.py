"""Qwen-Image: text to image, edit, layered.

Text precedes the images; its padding, where prompts differ in length, is masked. Edit puts the conditioning images
behind the generated one; layered generates several images of one size.
"""

from __future__ import annotations

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import conditioning_notes, mask_text
from dit_accel.pipelines.sizes import packed_sizes
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed images [B, N, C] with `img_shapes`, text [B, T, C] and its mask [B, T] or None."""
    return images_and_text(call, call.length("hidden_states"), text_first=True)


def images_and_text(call: ModelCall, tokens: int, name: str = "img_shapes", *, text_first: bool = False) -> CallLayout:
    """Images whose sizes the argument `name` lists (see `images`), text [B, T, C] and its mask [B, T] or None."""
    (frames, height, width), conditioning = images(call, tokens, name)
    text = call.length("encoder_hidden_states")
    grid = TokenGrid(frames, height, width, text=text, text_first=text_first, conditioning=conditioning)
    return mask_text(call, grid, call.get("encoder_hidden_states_mask"), conditioning_notes(conditioning))


def images(call: ModelCall, tokens: int, name: str) -> tuple[tuple[int, int, int], int]:
    """Number and size of the leading images of one size, (images, height, width), and the number of tokens behind them.

    Args:
        call: its argument `name` lists, for each sample, the (frames, height, width) of its images or of its one image.
        tokens: image tokens of each sample.
        name: of the argument.

    Raises:
        DitAccelError: the argument is missing, the samples differ, or the sizes make another number of tokens.
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
        raise DitAccelError(f"{name}={shapes} make {counted} image tokens, but the call has {tokens}.")
    return (frames, height, width), tokens - frames * height * width


FAMILY = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=packed_sizes(text=512),
    summary="Qwen-Image: text to image, edit, layered",
    timestep_scale=1000.0,
)
