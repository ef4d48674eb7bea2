"""Krea 2: text stands before the image, and its padding is masked."""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_grids, mask_text
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Packed image [B, N, C], text [B, T, layers, C] with its mask [B, T] or None, positions [T + N, 3]."""
    images = call.tensor("hidden_states", 3).shape[1]
    text = call.tensor("encoder_hidden_states", 4).shape[1]
    positions = call.once(call.tensor("position_ids", 2), torch.Tensor.clone)
    if len(positions) != text + images:
        raise DitAccelError(
            f"{call.owner} needs position_ids for {text} text and {images} image tokens, got {len(positions)}."
        )
    frames, height, width, conditioning = image_grids(positions[text:])
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    mask = call.get("encoder_attention_mask")
    return CallLayout(grid) if mask is None else mask_text(call, grid, mask)


def sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""
    return image_sizes(2 * vae_pixels(vae), text=512, text_first=True)


FAMILY = Family(
    name="krea2",
    transformers=("Krea2Transformer2DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    summary="Krea 2",
    timestep_scale=1000.0,
)
