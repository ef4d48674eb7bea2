"""Which query blocks are computed together: grouping rows of a block list so that their keys are gathered once."""

from __future__ import annotations

import torch

# Costs in units of one (query, key) pair, measured with 4 heads of 64 on 2 cores with AVX-512: starting a group costs
# as much as some 32,000 pairs, gathering a key and its value as much as some 96. The optimum is flat: half or twice as
# much changes the time of a sliding window by less than a tenth.
GROUP_COST = 32_768
KEY_COST = 96
# Pairs a merged group may hold: its mask is then at most 8 MiB as fp32.
MAX_PAIRS = 1 << 21
# Beyond this many distinct rows the matrix of overlaps is not worth its memory, and rows are only grouped if equal.
MAX_ROWS = 4096


def group_rows(listed: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor) -> list[list[int]]:
    """Partition the query blocks into groups to be computed together over the union of their keys.

    Rows with equal lists are always one group: a blocked or strided window has few distinct lists. Groups are then
    merged pairwise, best pairs first, as long as the estimated cost falls: neighbours in a sliding window share most
    of their keys, and one larger problem is cheaper than two small ones although some pairs are masked.

    Args:
        listed: bool [q_blocks, k_blocks].
        query_sizes, key_sizes: valid tokens in each block, int64 [q_blocks], [k_blocks].

    Returns:
        The groups, each a list of query blocks in ascending order; blocks without keys or tokens are in none.
    """
    rows, inverse = torch.unique(listed, dim=0, return_inverse=True)
    groups: list[list[int]] = [[] for _ in rows]
    for block, row in enumerate(inverse.tolist()):
        if query_sizes[block] > 0:
            groups[row].append(block)
    sizes = torch.zeros(len(rows), dtype=torch.float32).index_add_(0, inverse, query_sizes.float())
    weights = key_sizes.float()
    alive = (sizes > 0) & (rows.float() @ weights > 0)
    groups = [group for group, keep in zip(groups, alive.tolist(), strict=True) if keep]
    rows, sizes = rows[alive].float(), sizes[alive]
    while 1 < len(groups) <= MAX_ROWS:
        pairs = _matching(rows, sizes, weights)
        if not pairs:
            break
        kept = torch.ones(len(groups), dtype=torch.bool)
        for first, second in pairs:
            groups[first] += groups[second]
            rows[first] = torch.maximum(rows[first], rows[second])
            sizes[first] += sizes[second]
            kept[second] = False
        groups = [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]
        rows, sizes = rows[kept], sizes[kept]
    return [sorted(group) for group in groups]


def _matching(rows: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor) -> list[tuple[int, int]]:
    """Disjoint pairs of groups that are cheaper together, greedily from the best."""
    keys = rows @ weights
    union = keys[:, None] + keys - (rows * weights) @ rows.T
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
    for first, second in zip((order // best.shape[1]).tolist(), partner.flatten()[order].tolist(), strict=True):
        if first not in taken and second not in taken:
            taken |= {first, second}
            pairs.append((first, second))
    return pairs
