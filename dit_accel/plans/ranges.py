"""Ranges of a sequence that groups of processes hold in a ring, and which ranges read each other's keys."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from dit_accel.plans.plan import building
from dit_accel.plans.static import StaticPlan
from dit_accel.tokens import TokenGrid

Run = tuple[int, int]  # start and stop
Shares = tuple[int, ...]


class Range(NamedTuple):
    """What a group of processes holds: a run of each segment, counted from the segment's first token."""

    visual: Run
    conditioning: Run
    text: Run

    @property
    def visual_tokens(self) -> int:
        return self.visual[1] - self.visual[0]

    @property
    def dense_tokens(self) -> int:
        """Text and conditioning tokens, which attend to everything."""
        return sum(stop - start for start, stop in self[1:])

    @property
    def tokens(self) -> int:
        return self.visual_tokens + self.dense_tokens


def even_shares(total: int, ranks: int) -> Shares:
    """Shares as in `torch.tensor_split`: the first `total % ranks` shares are larger by one."""
    share, rest = divmod(total, ranks)
    return tuple(share + (rank < rest) for rank in range(ranks))


def streams_of(grid: TokenGrid, separate: bool) -> tuple[Run, ...]:
    """The separately shared runs of a sequence in model order: text apart from all others if `separate`, else one."""
    if not grid.text or not separate:
        return ((0, grid.tokens),)
    return tuple(itertools.pairwise((0, *sorted((grid.text_start, grid.visual_start))[1:], grid.tokens)))


def ranges_of(grid: TokenGrid, ulysses: int, ring: int, separate: bool = True) -> tuple[Range, ...]:
    """The range of each group of `ulysses` neighbouring ranks, of which each has an even share of every stream."""
    streams = []
    for start, stop in streams_of(grid, separate):
        ends = list(itertools.accumulate(even_shares(stop - start, ulysses * ring), initial=start))[::ulysses]
        streams.append(list(itertools.pairwise(ends)))
    firsts = grid.visual_start, grid.conditioning_start, grid.text_start
    segments = tuple(zip(firsts, (grid.visual, grid.conditioning, grid.text), strict=True))
    return tuple(Range(*(_common(runs, *segment) for segment in segments)) for runs in zip(*streams, strict=True))


def _common(runs: tuple[Run, ...], first: int, count: int) -> Run:
    """The tokens of a segment in one of the runs, counted from the segment's first token."""
    for start, stop in runs:
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            return low, high
    return 0, 0


@building()
def reads(plan: StaticPlan, ranges: tuple[Range, ...]) -> torch.Tensor:
    """Whether a range's visual queries attend to visual keys of another: bool [queries' ranges, keys' ranges].

    Decided by blocks of the sequence. A range may be said to read another of which it reads the block at the border
    alone; it never reads one that is not said.
    """
    key = "reads", ranges
    if key not in plan.built:
        visited, size = plan.raster_map()
        first = torch.arange(len(visited)) * size
        runs = torch.tensor([span.visual for span in ranges])
        overlap = ((first < runs[:, 1:]) & (first + size > runs[:, :1])).float()
        plan.built[key] = overlap @ visited.float() @ overlap.T > 0
    return plan.built[key]
