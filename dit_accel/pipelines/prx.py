"""PRX: text stands before the image, masked, and among the keys alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, text [B, T, C] and its mask [B, T] or None."""
    config: Any = transformer.config
    text = call.tensor("encoder_hidden_states", 3).shape[1]
    grid = dataclasses.replace(image_of(call, config.patch_size), text=text, text_first=True)
    mask = call.get("attention_mask")
    return CallLayout(grid) if mask is None else mask_text(call, grid, mask)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch and the VAE's strides; text as the tokenizer pads it."""
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
