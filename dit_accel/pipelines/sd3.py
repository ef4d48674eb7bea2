"""Stable Diffusion 3 and 3.5.

Text follows the image; its padding is attended, as in training. The first blocks of 3.5 medium have a second attention,
`attn2`, over the image alone; it shares its processor object with `attn`.
"""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, square_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    return CallLayout(image_of(call, transformer.config.patch_size, call.length("encoder_hidden_states")))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 77 tokens of CLIP and 256 of T5."""
    return square_sizes(transformer, vae, text=333, longest=transformer["pos_embed_max_size"])


FAMILY = Family(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    attention=("transformer_blocks.*.attn|attn2",),
    visual_attention=("transformer_blocks.*.attn2",),
    layout=layout,
    sizes=sizes,
    summary="Stable Diffusion 3 and 3.5",
)
