"""Generalized neighborhood attention: sliding, strided, blocked, dilated and causal windows, exact to the token.

Source: Hassani et al., "Generalized Neighborhood Attention", arXiv:2504.16922; dilation from "Dilated Neighborhood
Attention Transformer", arXiv:2209.15001.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.methods.settings import SharingSettings
from dit_accel.plans.masks import AxisTable, Mask, Product, axis_pairs
from dit_accel.plans.sharing import SharingPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

AXES = ("frames", "height", "width")
Window = int | float | str
PerAxis = tuple[Any, Any, Any]

# of `at_density`: 128 queries and 64 keys, a kernel's blocks, in a video and in an image
VIDEO_TILES = (2, 8, 8), (1, 8, 8)
IMAGE_TILES = (1, 8, 16), (1, 8, 8)
NEAR = 0.03  # windows within this relative distance of the wanted share are equally good
FULL = 1 - 1e-9


@dataclasses.dataclass(frozen=True)
class Config(SharingSettings):
    """Settings of gna, besides `SharingSettings`: one value for all axes, or one per axis (frames, height, width).

    Args:
        window: tokens (int >= 1), a fraction of the axis (float in (0, 1]), or "full". The default is that
            of the paper for HunyuanVideo, 18 x 24 x 24 of 30 x 48 x 80 tokens.
        stride: neighbouring queries that share one window, 1 <= stride <= window.
        dilation: distance of neighbouring keys, window * dilation <= axis.
        causal: whether a query sees only keys up to itself.

    An axis of one token ignores all of them. A single stride or dilation for all axes is clamped on shorter axes.
    """

    window: Window | tuple[Window, Window, Window] = option((0.6, 0.5, 0.3), ramps=True)
    stride: int | tuple[int, int, int] = option(1, least=1)
    dilation: int | tuple[int, int, int] = option(1, least=1)
    causal: bool | tuple[bool, bool, bool] = False

    def __post_init__(self) -> None:
        for value in per_axis(self.window):
            number = isinstance(value, int | float) and value > 0 and not (isinstance(value, float) and value > 1)
            if value != "full" and not number:
                raise DitAccelError(
                    f'gna needs window as a number of tokens >= 1, a fraction in (0, 1] or "full", got {value!r}.'
                )
        super().__post_init__()

    @property
    def keeps_all(self) -> bool:
        """Whether the settings keep every pair on any grid."""
        return set(per_axis(self.window)) <= {"full", 1.0} and not any(per_axis(self.causal))


def per_axis(value: Any) -> PerAxis:
    return value if isinstance(value, tuple) else (value, value, value)


def window_tokens(window: Window, length: int, dilation: int) -> int:
    """Tokens of a window on an axis; a fraction refers to ⌊length / dilation⌋, the least that one residue has."""
    if window == "full":
        return length
    if isinstance(window, float):
        return max(1, math.floor(window * (length // dilation) + 0.5))
    return int(window)


def axis_table(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> AxisTable:
    """Which keys each query of one axis sees.

    Queries and keys of one residue modulo `dilation` form a group. In it, each run of `stride` queries shares the
    window of its leader: the middle query, or the last one if causal. A window has `window` keys, one more to the left
    if even, and shifts inward at the borders. A causal window ends with the query itself.
    """
    position = torch.arange(length)
    residue, query = position % dilation, position // dilation
    group = length // dilation + (residue < length % dilation).long()
    first = query // stride * stride
    if causal:
        start = (torch.minimum(first + stride - 1, group - 1) - window + 1).clamp(min=0)
        stop = query + 1
    else:
        leader = torch.minimum(first + stride // 2, group - 1)
        start = torch.minimum((leader - window // 2).clamp(min=0), group - window)
        stop = start + window
    return AxisTable(start * dilation + residue, (stop - 1) * dilation + residue + 1, dilation)


def fit_axis(axis: int, length: int, config: Config) -> AxisTable:
    """The table of one axis of a grid, with scalar strides and dilations clamped; others are refused if too large."""
    if length == 1:
        return AxisTable.full(1)
    size = per_axis(config.window)[axis]
    dilation = per_axis(config.dilation)[axis]
    if not isinstance(config.dilation, tuple):
        smallest = 1 if isinstance(size, float) else window_tokens(size, length, 1)
        dilation = max(1, min(dilation, length // smallest))
    window = window_tokens(size, length, dilation)
    stride = per_axis(config.stride)[axis]
    if not isinstance(config.stride, tuple):
        stride = min(stride, window)
    if window * dilation > length:
        times = f" at dilation {dilation}" if dilation > 1 else ""
        raise DitAccelError(
            f"gna's window of {window} tokens{times} is larger than the {AXES[axis]} axis of {length}. Ask for at "
            f'most {max(1, length // dilation)}, a fraction such as 0.5, or "full".'
        )
    if stride > window:
        raise DitAccelError(
            f"gna needs stride <= window on the {AXES[axis]} axis, got stride {stride}, window {window}."
        )
    return axis_table(length, window, stride, dilation, per_axis(config.causal)[axis])


def make_plan(grid: TokenGrid, config: Config) -> SharingPlan:
    t, h, w = (fit_axis(axis, length, config) for axis, length in enumerate(grid.shape))
    return SharingPlan("gna", config, grid, Mask((Product(t, h, w),)), order="tile")


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """Windows and strides in whole tiles, so that away from the borders every visited block is full.

    A window of stride + 2 m key tiles begins and ends on a key tile if queries move in whole query tiles. Candidates
    have about the wanted share of the keys. Those with the least wasted pairs in visited blocks stay, and of these the
    window with the most even share of all axes is taken.
    """
    share = grid.visual_share(density)
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
    """Windows and strides of one axis in whole tiles of `query` and `key` positions, and the whole axis."""
    spans = [(window, stride) for stride in (query, 2 * query) for window in range(stride, length, 2 * key)]
    return [(length, length), *spans]


METHOD = Method(
    "gna",
    Config,
    make_plan,
    "generalized neighborhood attention: sliding, strided, blocked, dilated, causal windows per axis",
    source="arXiv:2504.16922",
    good_for="local detail",
    at_density=at_density,
)
