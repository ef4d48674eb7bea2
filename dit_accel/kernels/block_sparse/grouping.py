"""Which query blocks are computed together, over which key blocks: the dense problems of a block list."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

# Costs in units of one (query, key) pair, measured with PyTorch's fused CPU kernel on 4 heads of 64, AVX-512 and AMX.
# Packing and gathering a key cost as much as some 80 pairs in fp32 and 190 in 16 bits, but larger masks cost too: the
# optimum over sliding windows and bands is flat between 24 and 96.
KEY_COST = 64
# Starting a problem.
GROUP_COST = 32_768
# What a mask adds to a pair.
MASK_COST = 0.15
# Merging a query's results over two sets of keys.
MERGE_COST = 256
# Queries of a masked problem, roughly: what a key costs that leaves a problem of more queries.
MASKED_QUERIES = 256
# Pairs a masked group may hold: its mask is then at most 8 MiB as fp32.
MAX_PAIRS = 1 << 21
# Beyond this many distinct rows the matrix of overlaps is not worth its memory, and rows are only grouped if equal.
MAX_ROWS = 4096


class Group(NamedTuple):
    """A dense problem: query blocks over key blocks, in ascending order."""

    queries: list[int]
    keys: torch.Tensor  # bool [k_blocks]
    merged: bool  # an earlier group may hold the same queries over other keys


def group_rows(
    listed: torch.Tensor, whole: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor
) -> list[Group]:
    """Groups that together hold each listed pair of blocks once.

    There are two ways, and the one with the lower estimated cost is taken:

    * one group a query, over the union of its blocks' keys. Neighbours in a sliding window share most of their keys,
      and one larger problem is cheaper than two small ones although some pairs are masked.
    * first the keys that many queries see whole, without a mask, then the remaining keys in smaller groups: a band in
      each of many frames beside a few whole frames.

    Args:
        listed: bool [q_blocks, k_blocks].
        whole: bool, likewise: the listed pairs of blocks that need no mask.
        query_sizes, key_sizes: valid tokens in each block, int64 [q_blocks], [k_blocks].

    Returns:
        The groups; blocks without keys or tokens are in none.
    """
    cluster = _Clustering(query_sizes.float(), key_sizes.float())
    listed = listed & (query_sizes > 0)[:, None]
    single = cluster.groups(listed, common=False)
    first = [group for group in cluster.groups(whole & listed, common=True) if cluster.worth(group)]
    left = listed.clone()
    for group in first:
        left[group.queries] &= ~group.keys
    split = first + [group._replace(merged=True) for group in cluster.groups(left, common=False)]
    return split if first and cluster.cost(split, whole) < cluster.cost(single, whole) else single


@dataclasses.dataclass
class _Clustering:
    """Merges query blocks pairwise, best pairs first, as long as the estimated cost falls."""

    sizes: torch.Tensor  # tokens of the query blocks
    weights: torch.Tensor  # and of the key blocks

    def cost(self, groups: list[Group], whole: torch.Tensor) -> float:
        total = 0.0
        for group in groups:
            keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
            masked = not bool(whole[group.queries][:, group.keys].all())
            total += GROUP_COST + keys * (queries * (1 + MASK_COST * masked) + KEY_COST)
            total += MERGE_COST * queries * group.merged
        return total

    def worth(self, group: Group) -> bool:
        """Whether computing a group without a mask can pay for merging its results."""
        keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
        return keys * queries * MASK_COST > GROUP_COST + MERGE_COST * queries

    def groups(self, rows: torch.Tensor, *, common: bool) -> list[Group]:
        """Groups of query blocks whose keys are bool [q_blocks, k_blocks].

        Equal rows are always one group: a blocked or strided window has few distinct lists. The keys of a group are
        the union of its rows, or with `common` those that all its rows share.
        """
        rows, inverse = torch.unique(rows, dim=0, return_inverse=True)
        groups: list[list[int]] = [[] for _ in rows]
        for block, row in enumerate(inverse.tolist()):
            groups[row].append(block)
        sizes = torch.zeros(len(rows), dtype=torch.float32).index_add_(0, inverse, self.sizes)
        kept = rows.float() @ self.weights > 0
        while True:
            groups = [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]
            rows, sizes = rows[kept], sizes[kept]
            pairs = self._matching(rows.float(), sizes, common) if 1 < len(groups) <= MAX_ROWS else []
            if not pairs:
                return [Group(sorted(group), row, False) for group, row in zip(groups, rows, strict=True)]
            kept = torch.ones(len(groups), dtype=torch.bool)
            for one, other in pairs:
                groups[one] += groups[other]
                rows[one] = rows[one] & rows[other] if common else rows[one] | rows[other]
                sizes[one] += sizes[other]
                kept[other] = False

    def _matching(self, rows: torch.Tensor, sizes: torch.Tensor, common: bool) -> list[tuple[int, int]]:
        """Disjoint pairs of groups that are cheaper together, greedily from the best."""
        keys = rows @ self.weights
        shared = (rows * self.weights) @ rows.T
        if common:
            # Keys that only one of the two sees leave the group, to be masked among fewer queries.
            lost = (MASK_COST + KEY_COST / MASKED_QUERIES) * sizes
            gain = GROUP_COST + KEY_COST * shared - lost[:, None] * (keys[:, None] - shared) - lost * (keys - shared)
            gain[shared == 0] = 0
        else:
            union = keys[:, None] + keys - shared
            queries = sizes[:, None] + sizes
            alone = GROUP_COST + (sizes + KEY_COST) * keys
            gain = alone[:, None] + alone - (GROUP_COST + (queries + KEY_COST) * union)
            gain[queries * union > MAX_PAIRS] = 0
        gain.fill_diagonal_(0)
        best, partner = gain.topk(min(6, len(rows)), dim=1)
        order = best.flatten().argsort(descending=True, stable=True)
        order = order[best.flatten()[order] > 0]
        taken: set[int] = set()
        pairs = []
        for one, other in zip((order // best.shape[1]).tolist(), partner.flatten()[order].tolist(), strict=True):
            if one not in taken and other not in taken:
                taken |= {one, other}
                pairs.append((one, other))
        return pairs
