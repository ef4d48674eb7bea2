"""Wan 2.1."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.bench.rows import Axes, Shape, Transformer, latent


def inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, *latent(axes, config.patch_size), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_dim, dtype=dtype),
    }


SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_1_3B = Transformer("WanTransformer3DModel", inputs, SMALL, text=512)
WAN_14B = Transformer("WanTransformer3DModel", inputs, text=512)

SHAPES = (
    Shape("wan-1.3b-480p", (21, 30, 52), heads=12, transformer=WAN_1_3B),
    Shape("wan-14b-480p", (21, 30, 52), heads=40, transformer=WAN_14B),
    Shape("wan-14b-720p", (21, 45, 80), heads=40, transformer=WAN_14B),
)
