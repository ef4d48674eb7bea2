"""AuraFlow: learned registers and the text stand before the image, and all are attended."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dit_accel.pipelines.family import Call, Family, Layout
from dit_accel.pipelines.reading import image_of


def layout(transformer: nn.Module, call: Call) -> Layout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    model: Any = transformer
    text = model.register_tokens.shape[1] + call.tensor("encoder_hidden_states", 3).shape[1]
    return Layout(dataclasses.replace(image_of(call, model.config.patch_size), text=text, text_first=True))


FAMILY = Family(
    name="aura_flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    summary="AuraFlow",
    timestep_scale=1000.0,
)
