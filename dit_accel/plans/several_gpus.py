"""What several GPUs have to do in one layer's attention: pairs, traffic and balance, from counts alone.

The sequence lies in `ring` ranges, one range a Ulysses group: a run of the visual and conditioning tokens, and a run of
the text. Within a group an all-to-all gives every GPU the group's tokens for a share of the heads (DeepSpeed Ulysses,
arXiv:2309.14509). A group then needs the keys and values of those other ranges that its visual queries attend to (ring
attention, arXiv:2310.01889); the others are not sent. Text and conditioning attend to everything, so their queries
travel instead: every group attends with them to its own keys, and the partial results are merged. `ring=1` is Ulysses
alone, `ulysses=1` a ring alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.plans.plan import Plan, building
from dit_accel.plans.ranges import Range, even_shares, ranges_of, reads, streams_of
from dit_accel.plans.static import MaskPlan

Parallel = Literal["ulysses", "ring", "unified"]
MOST_GPUS = 256


@dataclasses.dataclass(frozen=True)
class Work:
    """One GPU's part of a layer's attention, forward, for one sample.

    Args:
        pairs: attended (query, key) pairs, over its heads.
        exchanged: values that it sends in the all-to-alls before and after attention.
        fetched: values that it receives from other ranges. `pipelines.ring.Traffic` counts both in a run.
    """

    pairs: int
    exchanged: int
    fetched: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What the GPUs do in one layer's attention, forward, for one sample.

    Args:
        ulysses, ring: GPUs that share the heads of one range; ranges of the sequence.
        work: of each GPU, in the order of ranks: the ranges one by one.
        fetches, possible: transfers of a range's keys to another one that are made; those that dense attention makes.
    """

    ulysses: int
    ring: int
    work: tuple[Work, ...]
    fetches: int
    possible: int

    @property
    def balance(self) -> float:
        """Mean over largest number of pairs of a GPU: 1.0 if all have the same."""
        pairs = [work.pairs for work in self.work]
        return sum(pairs) / len(pairs) / max(pairs)

    def compute_ms(self, tflops: float, head_dim: int) -> float:
        """Milliseconds of the GPU with most pairs, at 10^12 operations a second: 4 a pair and channel."""
        return max(work.pairs for work in self.work) * 4 * head_dim / tflops / 1e9

    def traffic_ms(self, link: float) -> float:
        """Milliseconds of the GPU with most traffic, 2 bytes a value, at `link` GB a second into or out of a GPU."""
        return max(work.exchanged + work.fetched for work in self.work) * 2 / link / 1e6


def degrees(parallel: Parallel, gpus: int, heads: int) -> tuple[int, int]:
    """Ulysses and ring degree of so many GPUs; "unified" takes the largest Ulysses degree that divides the heads.

    Raises:
        DitAccelError: Ulysses has more GPUs than heads.
    """
    if parallel == "ulysses" and gpus > heads:
        raise DitAccelError(f"Ulysses shares {heads} heads among at most {heads} GPUs, got {gpus}. Use unified.")
    ulysses = {"ulysses": gpus, "ring": 1, "unified": math.gcd(gpus, heads)}[parallel]
    return ulysses, gpus // ulysses


def forecast(
    plan: Plan, gpus: int, parallel: Parallel, heads: int, head_dim: int, *, separate: bool = True
) -> Forecast:
    """What each of several GPUs does in one layer's attention.

    Args:
        plan: of a static method that is exact to the token.
        gpus: how many share one sample, at least 1.
        heads, head_dim: of the layer.
        separate: as in `pipelines.sharding.Sharding`.

    Raises:
        DitAccelError: the plan's pairs are not known before the call, there are too many GPUs for the tokens or the
            heads, or too many tokens.
    """
    if not isinstance(plan, MaskPlan):
        raise DitAccelError(
            f"{plan.method} attends to pairs that only a call knows, or to whole blocks, so ranges of tokens cannot be "
            "counted. Use a static method that is exact to the token, such as gna, or dense."
        )
    ulysses, ring = degrees(parallel, gpus, heads)
    grid = plan.grid
    if gpus > min(grid.visual, MOST_GPUS):
        raise DitAccelError(
            f"At most {min(grid.visual, MOST_GPUS)} GPUs share {grid.visual:,} visual tokens, got {gpus}."
        )
    ranges = ranges_of(grid, ulysses, ring, separate)
    between, needed = range_pairs(plan, ranges), reads(plan, ranges)
    needed = needed & ~torch.eye(ring, dtype=torch.bool)
    dense = grid.tokens - grid.visual
    streams = [even_shares(stop - start, gpus) for start, stop in streams_of(grid, separate)]
    shares = [sum(of_process) for of_process in zip(*streams, strict=True)]
    work = []
    for index, span in enumerate(ranges):
        pairs = int(between[index].sum()) + span.visual_tokens * dense + dense * span.tokens
        others, around = dense - span.dense_tokens, span.dense_tokens
        keys = sum(ranges[other].visual_tokens for other in needed[index].nonzero().flatten().tolist()) + others
        # keys and values; dense queries; their partial results, of which each has a log-sum-exp
        fetched = (2 * keys + others + (ring - 1) * around) * head_dim + (ring - 1) * around
        held_by = shares[index * ulysses : (index + 1) * ulysses]
        for own_heads, held in zip(even_shares(heads, ulysses), held_by, strict=True):
            sent = 3 * held * (heads - own_heads) + own_heads * (span.tokens - held)
            work.append(Work(pairs * own_heads, sent * head_dim, fetched * own_heads))
    return Forecast(ulysses, ring, tuple(work), int(needed.sum()), ring * (ring - 1))


@building()
def range_pairs(plan: MaskPlan, ranges: tuple[Range, ...]) -> torch.Tensor:
    """Visual pairs between ranges of the sequence, int64 [queries' ranges, keys' ranges].

    A block of `raster_counts` counts for the range of its middle, so a count may be wrong by less than a block.
    """
    counts, size = plan.raster_counts()
    middle = (torch.arange(len(counts)) * size + size // 2).clamp(max=plan.grid.visual - 1)
    ends = torch.tensor([span.visual_tokens for span in ranges]).cumsum(0)
    owner = torch.searchsorted(ends, middle, right=True)
    rows = torch.zeros(len(ranges), len(counts), dtype=torch.int64).index_add_(0, owner, counts.long())
    return torch.zeros(len(ranges), len(ranges), dtype=torch.int64).index_add_(1, owner, rows)
