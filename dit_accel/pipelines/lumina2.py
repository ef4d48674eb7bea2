"""Lumina-Image 2.0.

Each sample is packed as [caption | image], its caption without padding. Captions of different lengths therefore move
the image's first row from sample to sample; the rows behind the image are masked. The refiners stay untouched.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import square_sizes
from dit_accel.tokens import TokenGrid


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and the caption's mask [B, T], valid tokens first."""
    lens = call.once(call.tensor("encoder_attention_mask", 2), _lengths)
    grid = image_of(call, transformer.config.patch_size, int(lens.max()), text_first=True)
    if bool((lens == grid.text).all()):
        return CallLayout(grid)
    return CallLayout(grid, text_lens=lens.to(call.device), rows=pack(grid, lens).to(call.device))


def _lengths(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum(1, dtype=torch.int32)


def pack(grid: TokenGrid, lens: torch.Tensor) -> torch.Tensor:
    """`CallLayout.rows` of samples packed as [valid text | image | padding], int64 [B, tokens], from lengths [B]."""
    text = torch.arange(grid.text).expand(len(lens), -1)
    lens = lens[:, None].long()
    text = torch.where(text < lens, text, text + grid.visual)
    return torch.cat((text, lens + torch.arange(grid.visual)), 1)


FAMILY = Family(
    name="lumina2",
    transformers=("Lumina2Transformer2DModel",),
    attention=("layers.*.attn",),
    layout=layout,
    # the caption is as long as the prompt
    sizes=lambda transformer, vae: square_sizes(
        transformer, vae, text=256, text_first=True, longest=min(transformer["axes_lens"][1:])
    ),
    summary="Lumina-Image 2.0",
    timestep_scale=1000.0,
    timestep_rises=True,
)
