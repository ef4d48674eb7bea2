"""JoyImage-Edit: text stands behind the images, which have one size and count as frames.

JoyImage-Edit-Plus packs the made image and its references, of any sizes, and masks padded text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.qwen_image import images
from dit_accel.pipelines.reading import conditioning_notes, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Latents [B, C, F, H, W], or [B, images, C, F, H, W], in patches; text [B, T, C]."""
    if call.get("shape_list") is not None:
        return _packed(call)
    config: Any = transformer.config
    latents = call.get("hidden_states")
    images = latents.shape[1] if latents.ndim == 6 else 1
    frames, height, width = call.tensor("hidden_states", latents.ndim).shape[-3:]
    grid = patch_grid((images * frames, height, width), config.patch_size)
    return CallLayout(dataclasses.replace(grid, text=call.tensor("encoder_hidden_states", 3).shape[1]))


def _packed(call: ModelCall) -> CallLayout:
    """Patches [B, N, C, F, H, W] of images with sizes in `shape_list`; text [B, T, C] and its mask [B, T] or None."""
    (frames, height, width), conditioning = images(call, call.tensor("hidden_states", 6).shape[1], "shape_list")
    grid = TokenGrid(
        frames, height, width, text=call.tensor("encoder_hidden_states", 3).shape[1], conditioning=conditioning
    )
    mask = call.get("encoder_hidden_states_mask")
    found = CallLayout(grid) if mask is None else mask_text(call, grid, mask)
    return dataclasses.replace(found, notes=conditioning_notes(conditioning))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Of the made image alone; the text holds the conditioning images too, as its encoder sees them."""
    return image_sizes(vae_pixels(vae) * transformer["patch_size"][-1], text=1024)


FAMILY = Family(
    name="joyimage",
    transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    attention=("double_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="JoyImage-Edit, JoyImage-Edit-Plus",
)
