"""Settings for a wanted density: how each method is told to keep a given share of the pairs on a given grid."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

from dit_accel.bench.rows import TOLERANCE
from dit_accel.errors import DitAccelError
from dit_accel.methods.gna import axis_table
from dit_accel.plans.masks import axis_pairs
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

# 128 queries and 64 keys, what the kernels take at a time, in a video and in an image.
VIDEO_TILES = (2, 8, 8), (1, 8, 8)
IMAGE_TILES = (1, 8, 16), (1, 8, 8)
NEAR = 0.03  # relative; windows that come this near to the wanted share are equally good
FULL = 1 - 1e-9


class OutOfReach(DitAccelError):
    """The method cannot keep so small a share of the pairs on this grid."""


def find_setting(method: str, grid: TokenGrid, density: float) -> dict[str, Any]:
    """The method's settings whose density on the grid is nearest to the wanted one.

    Args:
        method: registered name.
        grid: the sequence.
        density: share of all pairs, text included, in (0, 1].

    Raises:
        OutOfReach: the nearest is off by more than a fifth.
        DitAccelError: nobody has said how to find settings of this method.
    """
    if method not in FINDERS:
        raise DitAccelError(
            f"{method} has no rule that finds settings for a density (there is one for {', '.join(FINDERS)}); give the "
            f"settings themselves, as in --method {method}:KEY=VALUE."
        )
    config = FINDERS[method](grid, density)
    found = plan(method, grid, **config).density
    if abs(found - density) > TOLERANCE * density:
        raise OutOfReach(f"{method} on {grid} comes no nearer to a density of {density:g} than {found:.3f}")
    return config


def visual_share(grid: TokenGrid, density: float) -> float:
    """Share of the visual pairs to keep, so that with all pairs of text and reference tokens it comes to `density`."""
    around = grid.tokens**2 - grid.visual**2
    return (density * grid.tokens**2 - around) / grid.visual**2


def dense_setting(grid: TokenGrid, density: float) -> dict[str, Any]:
    return {}


def tile_setting(grid: TokenGrid, density: float) -> dict[str, Any]:
    def error(references: int) -> float:
        return abs(plan("tile", grid, references=references).density - density)

    return {"references": min(range(1, grid.frames + 1), key=error)}


def radial_setting(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The decay, by bisection of its logarithm; without the sink only if that keeps too much at any decay."""
    config: dict[str, Any] = {}
    for sink in (True, False):
        low, high = -24.0, math.log2(max(2, grid.frames))  # from single diagonals to every pair
        for _ in range(24):
            middle = (low + high) / 2
            if plan("radial", grid, decay=2**middle, sink=sink).density < density:
                low = middle
            else:
                high = middle
        config = {"decay": float(f"{2**high:.4g}"), "sink": sink}
        if abs(plan("radial", grid, **config).density - density) <= TOLERANCE * density:
            break
    return config


def sla_setting(grid: TokenGrid, density: float) -> dict[str, Any]:
    return {"topk": min(1.0, max(1e-6, float(f"{visual_share(grid, density):.6g}")))}


def gna_setting(grid: TokenGrid, density: float) -> dict[str, Any]:
    """Windows and strides in whole tiles, so that away from the borders every visited block is full.

    A window of stride + 2 m key tiles begins and ends on a key tile when queries move in whole query tiles. Of the
    windows that hold about the wanted share of the keys, those stay whose blocks waste least, and of these the one
    that covers the most even part of all axes.
    """
    share = visual_share(grid, density)
    if share >= FULL:
        return {"window": "full"}
    tiles = IMAGE_TILES if grid.frames == 1 else VIDEO_TILES

    def part(choice: tuple[tuple[int, int], ...]) -> float:
        return math.prod(window for window, _ in choice) / grid.visual

    def error(choice: tuple[tuple[int, int], ...]) -> float:
        return abs(part(choice) - share)

    @functools.cache
    def visited(axis: int, window: int, stride: int) -> int:
        table = axis_table(grid.shape[axis], window, stride)
        return int((axis_pairs(table, tiles[0][axis], tiles[1][axis]) > 0).sum())

    def waste(choice: tuple[tuple[int, int], ...]) -> float:
        return math.prod(visited(axis, *pair) for axis, pair in enumerate(choice)) / part(choice)

    def unevenness(choice: tuple[tuple[int, int], ...]) -> float:
        parts = [window / length for (window, _), length in zip(choice, grid.shape, strict=True) if length > 1]
        return max(parts) / min(parts)

    choices = list(itertools.product(*map(axis_choices, grid.shape, *tiles)))
    limit = max(NEAR * share, min(map(error, choices)))
    near = [choice for choice in choices if error(choice) <= limit]
    least = min(map(waste, near))
    best = min((choice for choice in near if waste(choice) <= 1.05 * least), key=unevenness)
    return {"window": tuple(window for window, _ in best), "stride": tuple(stride for _, stride in best)}


def axis_choices(length: int, query: int, key: int) -> list[tuple[int, int]]:
    """Windows and strides of one axis that keep to tiles of `query` and `key` positions; the whole axis is one."""
    choices = [(length, length)]
    for stride in (query, 2 * query):
        choices += [(window, stride) for window in range(stride, length, 2 * key)]
    return choices


FINDERS: dict[str, Callable[[TokenGrid, float], dict[str, Any]]] = {
    "dense": dense_setting,
    "gna": gna_setting,
    "radial": radial_setting,
    "sla": sla_setting,
    "tile": tile_setting,
}
