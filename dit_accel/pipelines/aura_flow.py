"""AuraFlow: learned registers and text precede the image; every token is attended."""

from __future__ import annotations

import math
from typing import Any

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, square_sizes

REGISTERS = 8


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    text = transformer.register_tokens.shape[1] + call.length("encoder_hidden_states")
    return CallLayout(image_of(call, transformer.config.patch_size, text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: the registers and 256 tokens; learned positions are a square of `pos_embed_max_size`."""
    longest = math.isqrt(transformer["pos_embed_max_size"])
    return square_sizes(transformer, vae, text=REGISTERS + 256, text_first=True, longest=longest)


FAMILY = Family(
    name="aura_flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="AuraFlow",
    timestep_scale=1000.0,
)
