"""What several GPUs would have to do in one layer's attention: pairs, traffic and balance, from counts alone.

The sequence lies in `ring` ranges of visual tokens, one range a Ulysses group; text and conditioning tokens are cut the
same way. Within a group an all-to-all gives every GPU the group's tokens for a share of the heads (DeepSpeed Ulysses,
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
from dit_accel.order import TokenOrder
from dit_accel.plans.plan import Plan, building
from dit_accel.plans.static import MaskPlan

Parallel = Literal["ulysses", "ring", "unified"]
MOST_TOKENS = 2**14  # in a block whose pairs are counted: their number fits in 32 bits
BLOCKS = 2**11  # of the whole sequence
MOST_GPUS = 256


@dataclasses.dataclass(frozen=True)
class Work:
    """One GPU's part of a layer's attention, forward, for one sample.

    Args:
        pairs: attended (query, key) pairs, over its heads.
        exchanged: values that it sends in the all-to-alls before and after attention.
        fetched: values that it receives from other ranges.
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


def even_shares(total: int, ranks: int) -> tuple[int, ...]:
    """Shares as in `torch.tensor_split`: the first `total % ranks` shares are larger by one."""
    share, rest = divmod(total, ranks)
    return tuple(share + (rank < rest) for rank in range(ranks))


def degrees(parallel: Parallel, gpus: int, heads: int) -> tuple[int, int]:
    """Ulysses and ring degree of so many GPUs; "unified" takes the largest Ulysses degree that divides the heads.

    Raises:
        DitAccelError: Ulysses has more GPUs than heads.
    """
    if parallel == "ulysses" and gpus > heads:
        raise DitAccelError(f"Ulysses shares {heads} heads among at most {heads} GPUs, got {gpus}. Take unified.")
    ulysses = {"ulysses": gpus, "ring": 1, "unified": math.gcd(gpus, heads)}[parallel]
    return ulysses, gpus // ulysses


def forecast(plan: Plan, gpus: int, parallel: Parallel, heads: int, head_dim: int) -> Forecast:
    """What each of several GPUs does in one layer's attention.

    Args:
        plan: of a static method that is exact to the token.
        gpus: how many share one sample, at least 1.
        heads, head_dim: of the layer.

    Raises:
        DitAccelError: the plan's pairs are not known before the call, there are too many GPUs for the tokens or the
            heads, or too many tokens.
    """
    if not isinstance(plan, MaskPlan):
        raise DitAccelError(
            f"{plan.method} attends to pairs that only a call knows, or to whole blocks, so ranges of tokens cannot be "
            "counted. Take a static method that is exact to the token, such as gna, or dense."
        )
    ulysses, ring = degrees(parallel, gpus, heads)
    grid = plan.grid
    if gpus > min(grid.visual, MOST_GPUS):
        raise DitAccelError(
            f"At most {min(grid.visual, MOST_GPUS)} GPUs share {grid.visual:,} visual tokens, got {gpus}."
        )
    between = range_pairs(plan, ring)
    dense = grid.tokens - grid.visual
    visual, around = even_shares(grid.visual, ring), even_shares(dense, ring)
    tokens = [sum(both) for both in zip(visual, around, strict=True)]
    needed = between > 0
    needed.fill_diagonal_(False)
    work = []
    for index in range(ring):
        pairs = int(between[index].sum()) + visual[index] * dense + dense * tokens[index]
        others = dense - around[index]
        keys = sum(visual[other] for other in range(ring) if needed[index, other]) + others
        fetched = (
            2 * keys + others + (ring - 1) * around[index]
        )  # keys and values; dense queries; their partial results
        for mine, held in zip(even_shares(heads, ulysses), even_shares(tokens[index], ulysses), strict=True):
            sent = 3 * held * (heads - mine) + mine * (tokens[index] - held)
            work.append(Work(pairs * mine, sent * head_dim, fetched * mine * head_dim))
    return Forecast(ulysses, ring, tuple(work), int(needed.sum()), ring * (ring - 1))


@building()
def range_pairs(plan: MaskPlan, ranges: int) -> torch.Tensor:
    """Visual pairs between even ranges of the sequence, int64 [queries' ranges, keys' ranges].

    Ranges are runs of whole blocks here, so a range may differ from `even_shares` by less than a block.
    """
    visual = plan.grid.visual
    size = max(math.ceil(visual / BLOCKS), 1)
    if size > MOST_TOKENS:
        raise DitAccelError(f"A forecast counts at most {BLOCKS * MOST_TOKENS:,} visual tokens, got {visual:,}.")
    order = TokenOrder(plan.grid, size)
    counts = plan.mask.block_pairs(order, order).long()
    middle = (torch.arange(order.visual_blocks) * size + size // 2).clamp(max=visual - 1)
    ends = torch.tensor(even_shares(visual, ranges)).cumsum(0)
    owner = torch.searchsorted(ends, middle, right=True)
    rows = torch.zeros(ranges, counts.shape[1], dtype=torch.int64).index_add_(0, owner, counts)
    return torch.zeros(ranges, ranges, dtype=torch.int64).index_add_(1, owner, rows)
