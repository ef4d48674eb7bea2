"""AuraFlow: learned registers and the text stand before the image, and all are attended."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    model: Any = transformer
    text = model.register_tokens.shape[1] + call.tensor("encoder_hidden_states", 3).shape[1]
    return CallLayout(dataclasses.replace(image_of(call, model.config.patch_size), text=text, text_first=True))


REGISTERS = 8


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: the registers and 256 tokens; learned positions are a square of `pos_embed_max_size`."""
    pixels = vae_pixels(vae)
    side, longest = transformer["sample_size"] * pixels, math.isqrt(transformer["pos_embed_max_size"])
    return image_sizes(pixels * transformer["patch_size"], side, text=REGISTERS + 256, text_first=True, longest=longest)


FAMILY = Family(
    name="aura_flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="AuraFlow",
    timestep_scale=1000.0,
)
