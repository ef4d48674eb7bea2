"""FLUX.1: images of 2,048 and 4,096 pixels a side."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.bench.rows import Axes, Shape, Transformer


def inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    _, height, width = axes
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype) if config.guidance_embeds else None,
    }


FLUX = Transformer("FluxTransformer2DModel", inputs, {"guidance_embeds": True})

SHAPES = (
    Shape("flux-2k", (1, 128, 128), heads=24, text=512, text_first=True),
    Shape("flux-4k", (1, 256, 256), heads=24, text=512, text_first=True, transformer=FLUX),
)
