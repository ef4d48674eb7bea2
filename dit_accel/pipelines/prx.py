"""PRX: text precedes the image, masked, as keys without queries."""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, text [B, T, C] and its mask [B, T] or None."""
    grid = image_of(call, transformer.config.patch_size, call.length("encoder_hidden_states"), text_first=True)
    return mask_text(call, grid, call.get("attention_mask"))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: as the tokenizer pads it."""
    return image_sizes(vae_pixels(vae) * transformer["patch_size"], 512, text=256, text_first=True)


FAMILY = Family(
    name="prx",
    transformers=("PRXTransformer2DModel",),
    attention=("blocks.*.attention",),
    layout=layout,
    sizes=sizes,
    summary="PRX",
    timestep_scale=1000.0,
    text_is_keys=True,
)
