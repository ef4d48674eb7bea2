"""JoyImage-Edit: text follows the images, which have one size and count as frames.

JoyImage-Edit-Plus packs the generated image and conditioning images of any sizes, and masks padded text.
"""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.qwen_image import images_and_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: Any, call: ModelCall) -> CallLayout:
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


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Of the generated image alone; the text encoder also sees the conditioning images."""
    return image_sizes(vae_pixels(vae) * transformer["patch_size"][-1], text=1024)


FAMILY = Family(
    name="joyimage",
    transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    attention=("double_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="JoyImage-Edit, JoyImage-Edit-Plus",
)
