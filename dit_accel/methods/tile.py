"""Attention tile: each frame sees itself and a few reference frames, and reference frames see everything.

Source: Ding et al., "Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile", arXiv:2502.06155.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.methods.settings import SharingSettings
from dit_accel.plans.masks import Band, Mask, check_frames
from dit_accel.plans.sharing import SharingPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(SharingSettings):
    """Settings of tile, besides `SharingSettings`.

    Args:
        references: number of reference frames k, spread over the video; k of T frames is the paper's mask "k:(T - k)".
    """

    references: int = option(dataclasses.MISSING, least=1, ramps=True)


def reference_frames(frames: int, references: int) -> torch.Tensor:
    """Frames 0, c, 2c, ... with c = ⌈frames / references⌉, at most `references` of them: int64."""
    return torch.arange(0, frames, -(-frames // references))[:references]


def make_plan(grid: TokenGrid, config: Config) -> SharingPlan:
    if config.references > grid.frames:
        raise DitAccelError(
            f"tile needs references <= the video's {grid.frames} token frames, got {config.references}. Ask for fewer "
            "references or more frames."
        )
    check_frames(grid.frames)
    frames = torch.arange(grid.frames)
    reference = torch.isin(frames, reference_frames(grid.frames, config.references))
    seen = (frames[:, None] == frames) | reference[:, None] | reference
    band = Band(seen.long() * (grid.height * grid.width), grid.height, grid.width)
    return SharingPlan("tile", config, grid, Mask((band,)))


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The number of reference frames whose density is nearest to the wanted one."""

    def error(references: int) -> float:
        return abs(make_plan(grid, Config(references)).density - density)

    return {"references": min(range(1, grid.frames + 1), key=error)}


METHOD = Method(
    "tile",
    Config,
    make_plan,
    "attention tile: same frame, plus a few reference frames both ways",
    source="arXiv:2502.06155",
    good_for="clips whose frames look much alike",
    at_density=at_density,
    sparsest=lambda grid: (3 * grid.frames - 2) / grid.frames**2,  # with one reference frame
)
