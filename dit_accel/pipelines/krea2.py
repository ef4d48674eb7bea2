"""Krea 2: text precedes the image; its padding is masked."""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_grids, mask_text
from dit_accel.pipelines.sizes import packed_sizes
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C], text [B, T, layers, C] with its mask [B, T] or None, positions [T + N, 3]."""
    images = call.length("hidden_states")
    text = call.length("encoder_hidden_states", 4)
    positions = call.once(call.tensor("position_ids", 2), torch.Tensor.clone)
    if len(positions) != text + images:
        raise DitAccelError(
            f"{call.owner} needs position_ids for {text} text and {images} image tokens, got {len(positions)}."
        )
    frames, height, width, conditioning = image_grids(positions[text:])
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    return mask_text(call, grid, call.get("encoder_attention_mask"))


FAMILY = Family(
    name="krea2",
    transformers=("Krea2Transformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=packed_sizes(text=512),
    summary="Krea 2",
    timestep_scale=1000.0,
)
