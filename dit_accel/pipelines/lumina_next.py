"""Lumina-Next: self-attention (`attn1`) sees the image alone; text enters through cross-attention.

The model makes a mask of the image tokens itself, in which all are valid.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import square_sizes


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches."""
    grid = image_of(call, transformer.config.patch_size)
    samples = len(call.tensor("hidden_states", 4))
    return CallLayout(grid, text_lens=torch.zeros(samples, dtype=torch.int32, device=call.device))


FAMILY = Family(
    name="lumina_next",
    transformers=("LuminaNextDiT2DModel",),
    attention=("layers.*.attn1",),
    layout=layout,
    sizes=square_sizes,
    summary="Lumina-Next",
    timestep_scale=1000.0,
    timestep_rises=True,
)
