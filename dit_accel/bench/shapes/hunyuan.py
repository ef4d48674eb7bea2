"""HunyuanVideo; at 768p without text, as GNA's paper measures it (arXiv:2504.16922)."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.bench.rows import Axes, Shape, Transformer, latent


def inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return {
        "hidden_states": torch.randn(1, config.in_channels, *latent(axes, patch), dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype) if config.guidance_embeds else None,
    }


HUNYUAN = Transformer("HunyuanVideoTransformer3DModel", inputs)

SHAPES = (
    Shape("hunyuan-720p", (33, 45, 80), heads=24, text=256, transformer=HUNYUAN),
    Shape("hunyuan-768p", (30, 48, 80), heads=24),
)
