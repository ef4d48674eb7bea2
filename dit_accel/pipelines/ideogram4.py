"""Ideogram 4: padding, text and image in one sequence; guidance comes from a second transformer, without text.

Padding attends to itself alone, and nothing reads its output. The model makes its N x N mask in sparse calls too, which
do not read it.
"""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import conditioning_notes, image_grids, mask_text
from dit_accel.pipelines.sizes import image_sizes, vae_pixels
from dit_accel.tokens import TokenGrid

PADDING, IMAGE = 0, 2  # values of `indicator`; text is 3


def layout(transformer: nn.Module, call: ModelCall) -> CallLayout:
    """Roles (`indicator`) and samples (`segment_ids`) [B, tokens], places [B, tokens, 3]."""
    indicator = call.tensor("indicator", 2)
    roles, samples = (call.once(each, torch.Tensor.clone) for each in (indicator, call.tensor("segment_ids", 2)))
    places = call.once(call.tensor("position_ids", 3), torch.Tensor.clone)
    text = int((roles[0] != IMAGE).sum())
    ordered = torch.equal(roles == IMAGE, (torch.arange(roles.shape[1]) >= text).expand_as(roles))
    if not ordered or not torch.equal(roles != PADDING, samples == samples[:, -1:]):
        raise DitAccelError(
            f"{call.owner} needs sequences that hold one sample each, [padding | text | image] of the same lengths, by "
            "indicator and segment_ids. Pass what the pipeline makes, or run it dense."
        )
    frames, height, width, conditioning = image_grids(places[0, text:])
    grid = TokenGrid(frames, height, width, text=text, text_first=True, conditioning=conditioning)
    return mask_text(call, grid, indicator, conditioning_notes(conditioning))


FAMILY = Family(
    name="ideogram4",
    transformers=("Ideogram4Transformer2DModel",),
    attention=("layers.*.attention",),
    layout=layout,
    # 2 x 2 latents a token; the pipeline pads every prompt to 2,048 tokens
    sizes=lambda transformer, vae: image_sizes(2 * vae_pixels(vae), side=2048, text=2048, text_first=True),
    summary="Ideogram 4",
    timestep_scale=1000.0,
    timestep_rises=True,
)
