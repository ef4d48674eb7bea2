"""Radial attention: the spatial window halves each time the distance in frames doubles.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv:2506.19852. `rule="paper"` is equation 4, `rule="released"` the block mask of the authors' code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.method import Method, MethodConfig
from dit_accel.order import TokenOrder
from dit_accel.plans.block_plan import BlockPlan
from dit_accel.plans.blocks import check_size
from dit_accel.plans.masks import Band, Mask, check_frames, prefix_sums
from dit_accel.plans.static import MaskPlan, StaticPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

Rule = Literal["paper", "released"]
THINNING = 128  # the released code thins diagonals narrower than this, whatever its block size


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of radial.

    Args:
        decay: factor of the window width, > 0.
        sink: whether every query also sees the first frame.
        block: tokens of a raster block under `rule="released"`; unused otherwise.
        rule: "paper", exact to the token, or "released", the block mask of the authors' code.
    """

    decay: float = option(1.0, above=0, ramps=True)
    sink: bool = True
    block: int = option(128, least=1)
    rule: Rule = "paper"


def paper_radius(frames: int, frame_tokens: int, decay: float, sink: bool) -> Tensor:
    """Radii of the paper's mask, |p - p'| < radius[t, t']: int64 [frames, frames]."""

    def radius(distance: int) -> int:
        band = max(distance, 1).bit_length() - 1
        width = decay * frame_tokens / 2**band
        if band == 0:
            return frame_tokens
        if width >= 1:
            return math.floor(min(width, frame_tokens))
        return int(width > 0 and 1 / width <= distance and distance % math.ceil(1 / width) == 0)

    return by_distance(frames, [radius(distance) for distance in range(frames)], frame_tokens, sink)


def released_radius(frames: int, frame_tokens: int, decay: float, sink: bool, block: int) -> Tensor:
    """Radii of the released code before its rounding to blocks: int64 [frames, frames]."""
    length = 2 ** frame_tokens.bit_length()  # the power of two strictly above the frame

    def radius(distance: int) -> int:
        diagonal = length / 2 ** distance.bit_length()
        if diagonal < THINNING and distance % int(THINNING / diagonal):
            return 0
        if distance <= 1:
            return frame_tokens
        return min(math.floor(max(diagonal * decay, block)) + 1, frame_tokens)

    return by_distance(frames, [radius(distance) for distance in range(frames)], frame_tokens, sink)


def by_distance(frames: int, radii: list[int], frame_tokens: int, sink: bool) -> Tensor:
    position = torch.arange(frames)
    radius = torch.tensor(radii)[(position[:, None] - position).abs()]
    if sink:
        radius[:, 0] = frame_tokens
    return radius


def released_blocks(radius: Tensor, frame_tokens: int, block: int) -> Tensor:
    """The released code's block mask over ⌊N / block⌋ blocks a side: bool.

    Each pair of frames is rounded to blocks at its own offset, and the results are united. So a block may miss allowed
    pairs and hold others.
    """
    frames = len(radius)
    side = frames * frame_tokens // block
    visited = torch.zeros(side + 1, side + 1, dtype=torch.bool)
    starts = [divmod(t * frame_tokens, block) for t in range(frames)]
    offsets = sorted({offset for _, offset in starts})

    @functools.cache
    def rounded(width: int, offset_q: int) -> dict[int, Tensor]:
        bands = round_band(frame_tokens, block, width, offset_q, offsets)
        return dict(zip(offsets, bands, strict=True))

    for (row, offset_q), widths in zip(starts, radius.tolist(), strict=True):
        for (column, offset_k), width in zip(starts, widths, strict=True):
            if width:
                band = rounded(width, offset_q)[offset_k]
                target = visited[row : row + len(band), column : column + len(band)]
                target |= band[: target.shape[0], : target.shape[1]]
    return visited[:side, :side]


def round_band(frame_tokens: int, block: int, radius: int, offset_q: int, offsets_k: list[int]) -> Tensor:
    """The blocks of a pair of frames that the rounding keeps, for each offset of the keys: bool [offsets, side, side].

    A block stays if more than 0.6 of its nonempty key columns are allowed for more than a third of the block's rows.
    A frame has ⌈frame_tokens / block⌉ blocks a side. Tokens that its offset moves behind them are dropped, as released.
    """
    side = math.ceil(frame_tokens / block)
    row = torch.arange(side, dtype=torch.int32)[:, None] * block - offset_q
    key = torch.arange(frame_tokens, dtype=torch.int32)
    low = torch.maximum(row.clamp(min=0), key - (radius - 1))
    high = torch.minimum((row + block).clamp_(max=frame_tokens), key + radius)
    column = high - low  # [side, keys]: allowed queries of each key in each block of rows
    # column > block / 3 in whole numbers
    dense, nonempty = (prefix_sums((column > least).to(torch.int32), 1) for least in (block // 3, 0))
    edges = torch.arange(side + 1) * block - torch.tensor(offsets_k)[:, None]
    edges.clamp_(min=0, max=frame_tokens)
    dense, nonempty = (sums[:, edges].diff(dim=-1) for sums in (dense, nonempty))  # [side, offsets, side]
    return (5 * dense > 3 * nonempty).transpose(0, 1)


def make_plan(grid: TokenGrid, config: Config) -> StaticPlan:
    check_frames(grid.frames)
    frame_tokens = grid.height * grid.width
    if config.rule == "paper":
        radius = paper_radius(grid.frames, frame_tokens, config.decay, config.sink)
        return MaskPlan("radial", config, grid, Mask((Band(radius, grid.height, grid.width),)))
    order = TokenOrder(grid, config.block)
    check_size(order, order)
    radius = released_radius(grid.frames, frame_tokens, config.decay, config.sink, config.block)
    visited = released_blocks(radius, frame_tokens, config.block)
    if grid.visual % config.block:
        visited = torch.nn.functional.pad(visited, (0, 1, 0, 1), value=True)
    return BlockPlan("radial", config, grid, config.block, visited)


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The decay, by bisection of its logarithm; without the sink only if every decay with it is a fifth too dense."""
    config: dict[str, Any] = {}
    for sink in (True, False):
        low, high = -24.0, math.log2(max(2, grid.frames))  # from single diagonals to every pair
        for _ in range(24):
            middle = (low + high) / 2
            if make_plan(grid, Config(decay=2**middle, sink=sink)).density < density:
                low = middle
            else:
                high = middle
        config = {"decay": float(f"{2**high:.4g}"), "sink": sink}
        if abs(make_plan(grid, Config(**config)).density - density) <= 0.2 * density:
            break
    return config


METHOD = Method(
    "radial",
    Config,
    make_plan,
    "radial attention: a spatial window that halves as the distance in frames doubles",
    source="arXiv:2506.19852",
    good_for="long videos, on a GPU",
    at_density=at_density,
    sparsest=lambda grid: (3 * grid.frames - 2) / grid.frames**2,  # neighbouring frames see each other whole
)
