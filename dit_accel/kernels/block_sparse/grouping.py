"""Which query blocks are computed together, over which keys: the cheapest dense problems for a map of blocks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Costs in units of one (query, key) pair, measured with PyTorch's fused CPU kernel on 4 heads of 64, AVX-512 and AMX.
# Packing and gathering a key costs some 80 pairs in fp32 and 190 in 16 bits. Larger masks cost too, so the optimum over
# sliding windows and bands is flat between 24 and 96.
KEY_COST = 64
GROUP_COST = 32_768  # of starting a problem
MASK_COST = 0.15  # of a mask, per pair
MERGE_COST = 256  # of merging a query's results over two sets of keys
RUN_COST, PACK_COST, VIEW_COST = 8192, 16, 64  # of a problem, of a key and of merging, where all rows are views
LONG_RUN = 512  # keys; in raster order only longer runs are worth a problem of their own without a mask
VECTOR = 16  # keys; a multiple of them is computed up to an eighth faster: rows of logits are aligned
MASKED_QUERIES = 256  # queries of a masked problem, roughly
MAX_PAIRS = 1 << 21  # of a masked group: its mask takes at most 8 MiB in fp32
MAX_ROWS = 4096  # with more distinct rows only equal ones are grouped: the matrix of overlaps would be too large


class Group(NamedTuple):
    """A dense problem: query blocks over key blocks, in ascending order."""

    queries: list[int]
    keys: Tensor  # bool [k_blocks]
    merged: bool  # an earlier group may hold the same queries over other keys


def group_rows(
    listed: Tensor, whole: Tensor, query_sizes: Tensor, key_sizes: Tensor, raster: bool = False
) -> list[Group]:
    """Groups that together hold each listed pair of blocks once, in the cheapest of three ways:

    * One group a query, over the union of its blocks' keys. Neighbours in a sliding window share most keys, so one
      larger problem with a mask is cheaper than two small ones.
    * First the keys that many queries see whole, without a mask; then the remaining keys in smaller groups. This suits
      a few whole frames beside a band in each of many frames.
    * In raster order, the same with consecutive queries for the remaining keys: their runs of keys are views.

    Args:
        listed: bool [q_blocks, k_blocks].
        whole: bool, likewise: the listed pairs of blocks that need no mask.
        query_sizes, key_sizes: valid tokens in each block, int64 [q_blocks], [k_blocks].
        raster: whether neighbouring blocks are neighbours in memory.

    Returns:
        The groups, without blocks that have no keys or tokens.
    """
    cluster = _Clustering(query_sizes.float(), key_sizes.float())
    listed = listed & (query_sizes > 0)[:, None]
    single = cluster.groups(listed, common=False)
    common = whole & listed
    if raster:
        common = _long_runs(common, min(len(key_sizes), -(-LONG_RUN // int(key_sizes.max()))))
    first = [group for group in cluster.groups(common, common=True) if cluster.worth(group)]
    left = listed.clone()
    for group in first:
        left[group.queries] &= ~group.keys
    rests = [cluster.groups(left, common=False)] + ([cluster.neighbours(left)] if raster else [])
    ways = [single, *(first + [group._replace(merged=bool(first)) for group in rest] for rest in rests)]
    return min(ways, key=lambda way: cluster.cost(way, whole, raster))


def _long_runs(rows: Tensor, size: int) -> Tensor:
    """Rows without their runs of fewer than `size` blocks."""
    starts = -F.max_pool1d(-rows.float(), size, 1)
    return F.max_pool1d(F.pad(starts, (size - 1, size - 1)), size, 1) > 0


@dataclasses.dataclass
class _Clustering:
    """Merges query blocks pairwise, best pairs first, as long as the estimated cost falls."""

    sizes: Tensor  # tokens of the query blocks
    weights: Tensor  # and of the key blocks

    def cost(self, groups: list[Group], whole: Tensor, raster: bool) -> float:
        total = 0.0
        for group in groups:
            keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
            masked = not bool(whole[group.queries][:, group.keys].all())
            gathered = GROUP_COST + keys * KEY_COST + MERGE_COST * queries * group.merged
            if raster and group.queries[-1] - group.queries[0] < len(group.queries):
                runs = int(F.pad(group.keys, (1, 0)).int().diff().clamp(min=0).sum())
                gathered = min(gathered, runs * (RUN_COST + VIEW_COST * queries) + keys * PACK_COST)
            total += gathered + keys * queries * (1 + MASK_COST * masked)
        return total

    def neighbours(self, rows: Tensor) -> list[Group]:
        """Groups of consecutive query blocks with much the same keys, `MASKED_QUERIES` tokens at most."""
        merged: list[Group] = []
        for row in rows.any(1).nonzero()[:, 0].tolist():
            group = Group([row], rows[row], False)
            if merged and merged[-1].queries[-1] == row - 1:
                both = Group([*merged[-1].queries, row], merged[-1].keys | rows[row], False)
                alike = self.weights[both.keys].sum() < 1.5 * self.weights[group.keys].sum()
                if alike and self.sizes[both.queries].sum() <= MASKED_QUERIES:
                    merged.pop()
                    group = both
            merged.append(group)
        return merged

    def worth(self, group: Group) -> bool:
        """Whether computing a group without a mask can pay for merging its results."""
        keys, queries = float(self.weights[group.keys].sum()), float(self.sizes[group.queries].sum())
        return keys * queries * MASK_COST > GROUP_COST + MERGE_COST * queries

    def groups(self, rows: Tensor, *, common: bool) -> list[Group]:
        """Groups of query blocks whose keys are bool [q_blocks, k_blocks].

        Equal rows are always one group: a blocked or strided window has few distinct lists. The keys of a group are
        the union of its rows, or with `common` those that all its rows share.
        """
        rows, inverse = torch.unique(rows, dim=0, return_inverse=True)
        groups: list[list[int]] = [[] for _ in rows]
        for block, row in enumerate(inverse.tolist()):
            groups[row].append(block)
        sizes = torch.zeros(len(rows), dtype=torch.float32).index_add_(0, inverse, self.sizes)
        left = rows.float() @ self.weights > 0
        while True:
            groups = [group for group, keep in zip(groups, left.tolist(), strict=True) if keep]
            rows, sizes = rows[left], sizes[left]
            pairs = self._matching(rows.float(), sizes, common) if 1 < len(groups) <= MAX_ROWS else []
            if not pairs:
                return [Group(sorted(group), row, False) for group, row in zip(groups, rows, strict=True)]
            left = torch.ones(len(groups), dtype=torch.bool)
            for one, other in pairs:
                groups[one] += groups[other]
                rows[one] = rows[one] & rows[other] if common else rows[one] | rows[other]
                sizes[one] += sizes[other]
                left[other] = False

    def _matching(self, rows: Tensor, sizes: Tensor, common: bool) -> list[tuple[int, int]]:
        """Disjoint pairs of groups that are cheaper together, greedily from the best."""
        keys = rows @ self.weights
        shared = (rows * self.weights) @ rows.T
        if common:
            # keys that only one of the two sees leave the group, and are masked among fewer queries
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


def parts_of(q: Tensor, k: Tensor, allowed: Tensor | None) -> list[Tensor]:
    """Places in k of the keys that some query sees: all of them, or in parts.

    Consecutive queries over a few runs of consecutive keys are views, if each run is computed by itself. The parts are
    the runs where merging their results is cheaper than gathering the keys.
    """
    seen = torch.ones(len(k), dtype=torch.bool) if allowed is None else allowed.any(0)
    vectors = F.pad(seen, (0, -len(k) % VECTOR)).view(-1, VECTOR).any(1)
    near = vectors.repeat_interleave(VECTOR)[: len(k)].nonzero()[:, 0]
    cuts = (k[near].diff() > 1).nonzero()[:, 0] + 1
    merging = len(cuts) * (RUN_COST + VIEW_COST * len(q))
    if int(q[-1] - q[0]) < len(q) and merging < (KEY_COST - PACK_COST) * len(near):
        return list(near.tensor_split(cuts))
    return [seen.nonzero()[:, 0]] if bool(seen.any()) else []
