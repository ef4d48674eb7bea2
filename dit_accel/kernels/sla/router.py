"""The router of SLA: which key blocks each query block attends to exactly, and which it drops.

Source: SLA (arXiv 2509.24006); thu-ml/SLA, sparse_linear_attention/utils.py. Queries and keys are averaged over their
blocks, the averages multiplied, and every query block keeps the keys with the highest products. The published code
subtracts the mean key first, which moves a whole row by a constant and so cannot change its order; it is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_accel.kernels.sla.layout import Cut, to_blocks
from dit_accel.order import TokenOrder

# Scores held at a time, so that a long sequence makes no blocks x blocks map for every head.
_SCORES_AT_ONCE = 1 << 22


@torch.library.custom_op("dit_accel::sla_route", mutates_args=())
def route_blocks(
    q: torch.Tensor, k: torch.Tensor, cut: Sequence[int], critical: int, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose key blocks by content. No gradient flows through the choice.

    A query block's key blocks are ranked by ``mean(q block) . mean(k block)``, taken over the tokens that are there,
    in fp32 (fp64 for fp64 input), highest first and of equal ones the lower index first. The first `critical` are kept,
    the last `skipped` dropped. The same input gives the same lists on every run.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D], any strides.
        cut: how they are cut into blocks, as `dit_accel.kernels.sla.layout.Cut.pack` gives it.
        critical, skipped: blocks to keep and to drop in every row; at least one and at least zero, together no more
            than there are.

    Returns:
        Critical and skipped blocks, ascending: int32 [B, H, blocks, critical] and int32 [B, H, blocks, skipped].
    """
    order = Cut.unpack(cut).order
    queries, keys = block_means(q, order), block_means(k, order)
    batch, heads, blocks, _ = queries.shape
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * blocks))
    kept, dropped = [], []
    for part in queries.split(rows, dim=2):
        scores = torch.nan_to_num(part @ keys.mT, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        kept.append(highest(scores, critical))
        dropped.append(lowest(scores, skipped))
    return torch.cat(kept, dim=2), torch.cat(dropped, dim=2)


@route_blocks.register_fake
def _(q, k, cut, critical, skipped):
    rows = *q.shape[:2], Cut.unpack(cut).blocks
    return tuple(q.new_empty((*rows, n), dtype=torch.int32) for n in (critical, skipped))


def block_means(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean of every block's tokens: [B, H, visual, D] to [B, H, blocks, D], fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if order.tile is not None:
        held = to_blocks(x.new_ones(order.grid.visual, 1, dtype=wide), order).sum(-2)
        return to_blocks(x, order).sum(-2, dtype=wide) / held
    whole = order.grid.visual // order.block
    runs = x[..., : whole * order.block, :].unflatten(-2, (whole, order.block)) if whole else x[..., :0, None, :]
    means = runs.mean(-2, dtype=wide)
    tail = x[..., whole * order.block :, :]
    return torch.cat([means, tail.mean(-2, keepdim=True, dtype=wide)], dim=-2) if tail.shape[-2] else means


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` highest scores, of equal ones the lowest positions: int32 [..., count], ascending."""
    width = scores.shape[-1]
    if count == 0:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int32)
    # topk does not say which of equal scores it takes, so only its threshold is used.
    threshold = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    positions = torch.arange(width, dtype=torch.int32, device=scores.device)
    return torch.where(chosen, positions, width).topk(count, largest=False, sorted=True).values


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` lowest scores, of equal ones the highest positions: int32 [..., count], ascending."""
    return scores.shape[-1] - 1 - highest(-scores.flip(-1), count).flip(-1)
