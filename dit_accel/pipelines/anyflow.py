"""AnyFlow, bidirectional: self-attention (`attn1`) sees the video alone, as in Wan; the latent is [B, F, C, H, W]."""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines import wan
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, patch_grid


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches."""
    _, frames, _, height, width = call.tensor("hidden_states", 5).shape
    return CallLayout(patch_grid((frames, height, width), transformer.config.patch_size))


FAMILY = Family(
    name="anyflow",
    transformers=("AnyFlowTransformer3DModel",),
    attention=("blocks.*.attn1",),
    layout=layout,
    sizes=wan.sizes,
    summary="AnyFlow, bidirectional",
    recommended=TRAINING_FREE,
)
