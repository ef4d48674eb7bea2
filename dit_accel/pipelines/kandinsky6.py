"""Kandinsky 6: self-attention of the video's part of each block; sound and text stay the model's own.

A reference frame behind the video, whose position in time starts again, is dense both ways.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.pipelines import kandinsky5
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall, patch_grid
from dit_accel.pipelines.reading import conditioning_notes
from dit_accel.tokens import TokenGrid


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, F, H, W, C], cut into patches, and its positions in time, rows and columns or None."""
    grid = patch_grid(call.tensor("hidden_states", 5).shape[1:4], transformer.config.patch_size)
    places = call.get("visual_rope_pos")
    frames = grid.frames if places is None else call.once(places[0], _rising)
    conditioning = (grid.frames - frames) * grid.height * grid.width
    return CallLayout(
        TokenGrid(frames, grid.height, grid.width, conditioning=conditioning), notes=conditioning_notes(conditioning)
    )


def _rising(places: torch.Tensor) -> int:
    """How many values rise from the start."""
    back = torch.nonzero(places[1:] <= places[:-1]).flatten()
    return int(back[0]) + 1 if len(back) else len(places)


FAMILY = Family(
    name="kandinsky6",
    transformers=("Kandinsky6Transformer3DModel",),
    attention=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    layout=layout,
    sizes=kandinsky5.FAMILY.sizes,
    summary="Kandinsky 6: text and image to video with sound; the video's self-attention",
    head_dim=kandinsky5.FAMILY.head_dim,
    recommended=TRAINING_FREE,
)
