"""CogVideoX-5B."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.bench.rows import Axes, Shape, Transformer, latent


def inputs(config: Any, axes: Axes, text: int, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = latent(axes, (1, config.patch_size, config.patch_size))
    frames_of, rows, columns = axes
    crop, device = ((0, 0), (rows, columns)), torch.get_default_device()
    rotary = get_3d_rotary_pos_embed(config.attention_head_dim, crop, (rows, columns), frames_of, device=device)
    return {
        "hidden_states": torch.randn(1, frames, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim, dtype=dtype),
        "image_rotary_emb": rotary if config.use_rotary_positional_embeddings else None,
    }


COGVIDEOX_5B = Transformer(
    "CogVideoXTransformer3DModel",
    inputs,
    {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
)

SHAPES = (Shape("cogvideox", (13, 30, 45), heads=48, head_dim=64, text=226, text_first=True, transformer=COGVIDEOX_5B),)
