"""Which heads each of several GPUs computes, and how evenly that shares the pairs.

Under Ulysses every GPU has equally many heads of all tokens. A routed method keeps other numbers of pairs in each head,
so the GPU with the densest heads makes the others wait. Heads can be given by what they kept in the last call.

Source: xDiT's issue 727 asks for a greedy assignment. Dealing the ranked heads out in turn, forth and back, is nearly
as even, and needs no value on the host, so no GPU is waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from dit_accel.plans.ranges import even_shares

Heads = tuple[tuple[int, ...], ...]  # of each GPU


def dealt(weights: torch.Tensor, gpus: int) -> torch.Tensor:
    """The heads of the first GPU, then those of the next: int64 [heads], on the device of the weights.

    The ranked heads go to the GPUs in turn, every second round backwards; those of a last, shorter round to the first
    GPUs. So numbers of heads are those of `even_shares`. Equal weights go by their index: all GPUs find the same.

    Args:
        weights: [heads], such as the pairs that each kept in the last call.
    """
    ranking = weights.argsort(descending=True, stable=True)
    rounds, rest = divmod(len(weights), gpus)
    table = ranking[: rounds * gpus].view(rounds, gpus)
    table = torch.where(torch.arange(rounds, device=table.device)[:, None] % 2 == 0, table, table.flip(1))
    longer = torch.cat((table[:, :rest], ranking[rounds * gpus :].view(min(rest, 1), rest)))
    return torch.cat((longer.T.reshape(-1), table[:, rest:].T.reshape(-1)))


def in_order(heads: int, gpus: int) -> Heads:
    """Neighbouring heads for each GPU, as Ulysses gives them."""
    ends = list(itertools.accumulate(even_shares(heads, gpus), initial=0))
    return tuple(tuple(range(begin, end)) for begin, end in itertools.pairwise(ends))


def by_weight(weights: Sequence[float], gpus: int) -> Heads:
    """The heads that `dealt` gives to each GPU, ascending."""
    order = dealt(torch.tensor(weights, dtype=torch.float64), gpus).tolist()
    return tuple(tuple(sorted(order[place] for place in places)) for places in in_order(len(order), gpus))


def imbalance(weights: Sequence[float], heads: Heads) -> float:
    """Largest over mean sum of the GPUs' weights: 1.0 if all have the same."""
    sums = [sum(weights[head] for head in group) for group in heads]
    return max(sums) * len(sums) / sum(sums)


def over_steps(weights: Sequence[Sequence[float]], gpus: int) -> tuple[float, float]:
    """The mean `imbalance` of a layer over its steps but the first: in order, and by the weights of the step before.

    Args:
        weights: of each step and head, at least two steps.
    """
    heads = in_order(len(weights[0]), gpus)
    pairs = list(itertools.pairwise(weights))
    before = [imbalance(now, heads) for _, now in pairs]
    after = [imbalance(now, by_weight(last, gpus)) for last, now in pairs]
    return sum(before) / len(pairs), sum(after) / len(pairs)
