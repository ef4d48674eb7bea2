"""CLEAR: each query of an image sees the keys in a disc around it; text stays exact.

Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", arXiv:2412.16112. The
mask is that of the authors' code: dy² + dx² < r², cut off at the borders. Its learned, pooled extra keys are not
part of this method. Several frames, such as an image and one that conditions it, see each other's discs: our extension.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch

from dit_accel.method import Method, MethodConfig
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.plan import MaskPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of clear.

    Args:
        radius: r, in tokens; the published ones are 8, 16 and 32.
    """

    radius: int = option(16, least=1)


def reach(radius: int, row: int) -> int:
    """The largest |dx| with row² + dx² < radius², for |row| < radius."""
    return math.isqrt(radius**2 - row**2 - 1)


def shifted(length: int, first: int, last: int) -> AxisTable:
    """Query i sees the keys i + first, ..., i + last that are on the axis."""
    position = torch.arange(length)
    return AxisTable((position + first).clamp(0, length), (position + last + 1).clamp(0, length))


def make_plan(grid: TokenGrid, config: Config) -> MaskPlan:
    """The disc as disjoint terms: one for each run of rows that reach equally far to both sides."""
    rows = range(max(1 - config.radius, 1 - grid.height), min(config.radius, grid.height))
    frames = AxisTable.full(grid.frames)
    terms = []
    for wide, run in itertools.groupby(rows, lambda row: min(reach(config.radius, row), grid.width - 1)):
        first, *rest = run
        last = rest[-1] if rest else first
        terms.append(Product(frames, shifted(grid.height, first, last), shifted(grid.width, -wide, wide)))
    return MaskPlan("clear", config, grid, Mask(tuple(terms)), order="tile")


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The radius whose share of the visual pairs is nearest to what the density leaves for them."""
    wanted = grid.visual_share(density) * (grid.height * grid.width) ** 2

    def error(radius: int) -> float:
        """Distance of the disc's pairs from the wanted ones; a row distance y occurs height - |y| times."""
        pairs = 0
        for y in range(max(1 - radius, 1 - grid.height), min(radius, grid.height)):
            x = min(reach(radius, y), grid.width - 1)
            pairs += (grid.height - abs(y)) * (grid.width * (2 * x + 1) - x * (x + 1))
        return abs(pairs - wanted)

    return {"radius": min(range(1, math.isqrt(grid.height**2 + grid.width**2) + 2), key=error)}


METHOD = Method(
    "clear",
    Config,
    make_plan,
    "CLEAR: the keys in a disc around each query of an image",
    source="arXiv:2412.16112",
    good_for="large images",
    needs_training=True,
    at_density=at_density,
    sparsest=lambda grid: 1 / grid.visual if grid.frames == 1 else 1.0,  # radius 1: the query itself
)
