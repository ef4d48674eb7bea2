"""PixArt-alpha and PixArt-sigma: self-attention (`attn1`) sees the image alone; text enters through cross-attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines.family import Call, Family, Layout
from dit_accel.pipelines.reading import image_of


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, C, H, W] in patches."""
    config: Any = transformer.config
    return Layout(image_of(call, config.patch_size))


FAMILY = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    summary="PixArt-alpha, PixArt-sigma",
)
