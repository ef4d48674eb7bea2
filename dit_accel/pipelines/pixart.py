"""PixArt-alpha and PixArt-sigma: self-attention (`attn1`) sees the image alone; text enters through cross-attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches."""
    config: Any = transformer.config
    return CallLayout(image_of(call, config.patch_size))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """From the patch."""
    pixels = vae_pixels(vae)
    return image_sizes(pixels * transformer["patch_size"], transformer["sample_size"] * pixels)


FAMILY = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="PixArt-alpha, PixArt-sigma",
)
