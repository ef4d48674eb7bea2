"""Which heads each of several GPUs computes, and how evenly that shares the pairs.

Under Ulysses every GPU has equally many heads of all tokens. A routed method keeps other numbers of pairs in each head,
so the GPU with the densest heads makes the others wait. Heads can be given by what they kept in the last step.

Source: the greedy assignment that xDiT's issue 727 asks for; it is Graham's rule (1969) with equally many heads a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dit_accel.plans.ranges import even_shares

Heads = tuple[tuple[int, ...], ...]  # of each GPU


def in_order(heads: int, gpus: int) -> Heads:
    """Neighbouring heads for each GPU, as Ulysses gives them."""
    ends = list(itertools.accumulate(even_shares(heads, gpus), initial=0))
    return tuple(tuple(range(begin, end)) for begin, end in itertools.pairwise(ends))


def by_weight(weights: Sequence[float], gpus: int) -> Heads:
    """The heaviest head first, each to the GPU with the smallest sum that has room; numbers of heads as `in_order`.

    Args:
        weights: of each head, such as the pairs that it kept in the last step. Equal ones go by their index, so all
            GPUs find the same assignment.
    """
    room = even_shares(len(weights), gpus)
    given: list[list[int]] = [[] for _ in room]
    sums = [0.0] * gpus
    for head in sorted(range(len(weights)), key=lambda head: -weights[head]):
        gpu = min((gpu for gpu in range(gpus) if len(given[gpu]) < room[gpu]), key=lambda gpu: sums[gpu])
        given[gpu].append(head)
        sums[gpu] += weights[head]
    return tuple(tuple(sorted(heads)) for heads in given)


def imbalance(weights: Sequence[float], heads: Heads) -> float:
    """Largest over mean sum of the GPUs' weights: 1.0 if all have the same."""
    sums = [sum(weights[head] for head in own) for own in heads]
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
