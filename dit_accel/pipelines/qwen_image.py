"""Qwen-Image, Nucleus-Image and JoyImage-Edit: packed images whose sizes the call lists, and masked text."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.reading import conditioning_notes, mask_text
from dit_accel.pipelines.sizes import image_sizes, packed_sizes, vae_pixels
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


def joyimage(transformer: Any, call: ModelCall) -> CallLayout:
    """Latents [B, C, F, H, W], or [B, images, C, F, H, W], in patches; text [B, T, C].

    Or patches [B, N, C, F, H, W] of images with sizes in `shape_list`, and text with its mask [B, T] or None.
    """
    if call.get("shape_list") is not None:
        return images_and_text(call, call.length("hidden_states", 6), "shape_list")
    latents = call.get("hidden_states")
    images = latents.shape[1] if latents.ndim == 6 else 1
    frames, height, width = call.tensor("hidden_states", latents.ndim).shape[-3:]
    sizes, text = (images * frames, height, width), call.length("encoder_hidden_states")
    return CallLayout(patch_grid(sizes, transformer.config.patch_size, text))


FAMILIES = (
    # Edit-Plus packs the generated image and conditioning images of any sizes, and masks padded text.
    Family(
        name="joyimage",
        transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
        attention=("double_blocks.*.attn",),
        layout=joyimage,
        # of the generated image alone; the text encoder also sees the conditioning images
        sizes=lambda transformer, vae: image_sizes(vae_pixels(vae) * transformer["patch_size"][-1], text=1024),
        summary="JoyImage-Edit, JoyImage-Edit-Plus",
    ),
    # Text follows the image, as keys without queries. Diffusers' TextKVCache, which keeps its keys and values between
    # steps, works with it.
    Family(
        name="nucleus_image",
        transformers=("NucleusMoEImageTransformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=lambda transformer, call: images_and_text(call, call.length("hidden_states")),
        sizes=packed_sizes(text=1024, text_first=False),
        summary="Nucleus-Image",
        timestep_scale=1000.0,
        text_is_keys=True,
    ),
    # Text precedes the images. Edit puts the conditioning images behind the generated one; layered generates several
    # images of one size.
    Family(
        name="qwen_image",
        transformers=("QwenImageTransformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=layout,
        sizes=packed_sizes(text=512),
        summary="Qwen-Image: text to image, edit, layered",
        timestep_scale=1000.0,
    ),
)
