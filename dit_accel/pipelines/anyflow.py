"""AnyFlow, bidirectional: self-attention (`attn1`) sees the video alone, as in Wan; latents come frame by frame."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.pipelines import wan
from dit_accel.pipelines.family import CallLayout, Family, ModelCall, patch_grid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches."""
    config: Any = transformer.config
    _, frames, _, height, width = call.tensor("hidden_states", 5).shape
    return CallLayout(patch_grid((frames, height, width), config.patch_size))


FAMILY = Family(
    name="anyflow",
    transformers=("AnyFlowTransformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    sizes=wan.sizes,
    summary="AnyFlow, bidirectional",
)
