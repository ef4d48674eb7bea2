"""The router in plain PyTorch: levels are found by bisection, nothing is sorted and nothing waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.kernels.cuts import block_means, to_blocks
from dit_accel.kernels.router.rule import RouterArguments, thresholds
from dit_accel.order import TokenOrder, valid_tokens

# Elements of the score map held at once, so that a long sequence has no blocks x blocks map for every head.
_SCORES_AT_ONCE = 1 << 22


def route(q: torch.Tensor, k: torch.Tensor, call: RouterArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.route`."""
    query_order, key_order = call.query_order, call.key_order
    queries, keys = cell_means(q, query_order, call.cells), cell_means(k, key_order, call.cells)
    batch, heads, blocks, *_ = queries.shape
    threshold = pooled = ranked = None
    if call.tau is not None:
        threshold = thresholds(queries[..., 0, :], keys[..., 0, :], call.tau, call.exact, call.scale)
    if call.similarity is not None:
        pooled = self_similarity(q, query_order) > call.similarity
        ranked = self_similarity(k, key_order) > call.similarity
    limits = [
        None if x is None else x.expand(batch, heads, blocks) for x in (threshold, call.counts, call.shares, pooled)
    ]
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * keys.shape[2] * call.cells**2))
    chunks: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, blocks, rows):
        part = slice(first, first + rows)
        scores = _scores(queries[:, :, part], keys, (query_order, key_order), part, call.cells, call.scale)
        level, count, share, similar = (None if x is None else x[:, :, part] for x in limits)
        forced = None if call.forced is None else call.forced[part]
        chosen = _choose(scores, call.factor, level, count, share, similar, ranked, forced)
        worst = scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int32)
        if call.skip:  # of equal scores the last rank lowest
            worst, _ = lists_of(best(-scores.flip(-1), None, call.skip).flip(-1), call.skip)
        chunks.append((*lists_of(chosen, call.width), worst))
    indices, lengths, lowest = (torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
    return indices, lengths, lowest


def cell_means(x: torch.Tensor, order: TokenOrder, cells: int) -> torch.Tensor:
    """Mean of the tokens of every cell: [B, H, visual, D] to [B, H, blocks, cells, D], fp32 or fp64; 0 for none."""
    if cells == 1:
        return block_means(x, order)[..., None, :]
    wide = torch.promote_types(x.dtype, torch.float32)
    if order.tile is None:
        runs = block_means(x, TokenOrder(order.grid, order.block // cells))
        runs = F.pad(runs, (0, 0, 0, order.visual_blocks * cells - runs.shape[-2]))
        return runs.unflatten(-2, (order.visual_blocks, cells))
    sums = to_blocks(x, order).unflatten(-2, (cells, -1)).sum(-2, dtype=wide)
    return sums / cell_sizes(order, cells, x.device).clamp(min=1)[..., None]


def deviations(x: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.deviations`."""
    means, held = block_means(x, order), valid_tokens(order, x.device)[:, None]
    slots = to_blocks(x.to(means.dtype), order).sub(means[..., None, :]).abs_()
    if order.visual_blocks * order.block > order.grid.visual:  # a padding slot is 0 and deviates by the mean
        slots *= to_blocks(means.new_ones(order.grid.visual, 1), order)
    return means, slots.sum(-2) / held


def cell_sizes(order: TokenOrder, cells: int, device: torch.device) -> torch.Tensor:
    """Tokens in every cell: int64 [blocks, cells]."""
    if cells == 1:
        return valid_tokens(order, device).long()[:, None]
    ones = torch.ones(order.grid.visual, 1, dtype=torch.int64, device=device)
    return to_blocks(ones, order).unflatten(-2, (cells, -1)).sum((-2, -1))


def self_similarity(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean cosine over all pairs of a block's tokens, a token with itself included: [B, H, blocks].

    The mean of the Gram matrix of unit vectors is the squared length of their mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return block_means(F.normalize(x.to(wide), dim=-1), order).square().sum(-1)


@torch.no_grad()
def rank(
    q: torch.Tensor,
    k: torch.Tensor,
    orders: tuple[TokenOrder, TokenOrder],
    rows: torch.Tensor,
    cells: int,
    scale: float,
) -> torch.Tensor:
    """Key blocks of some query blocks as the router ranks them: int64 [B, H, rows, key blocks], the best first.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D].
        orders: of the visual queries and keys alone.
        rows: int64, the query blocks.
        cells, scale: as in `RouterArguments`.
    """
    queries, keys = (cell_means(x, order, cells) for x, order in zip((q, k), orders, strict=True))
    scores = _scores(queries[:, :, rows], keys, orders, rows, cells, scale)
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    orders: tuple[TokenOrder, TokenOrder],
    part: slice | torch.Tensor,
    cells: int,
    scale: float,
) -> torch.Tensor:
    """Scores [B, H, rows, key blocks] of some rows; NaN counts as inf, so that it is kept and shows in the output.

    Args:
        queries: cell means of the rows, [B, H, rows, cells, D].
        keys: [B, H, key blocks, cells, D].
        orders: of queries and keys.
        part: the rows.
        cells, scale: as in `RouterArguments`.
    """
    queries = torch.where(queries.isfinite(), queries, 0)  # else all scores of a row are NaN, and none stands out
    if cells == 1:
        scores = queries[..., 0, :] @ keys[..., 0, :].mT
    else:
        logits = queries.flatten(-3, -2) @ keys.flatten(-3, -2).mT * scale
        logits = logits.unflatten(-1, (-1, cells)).unflatten(-3, (-1, cells))  # [B, H, i, a, j, c]
        held_q, held_k = (cell_sizes(order, cells, queries.device) > 0 for order in orders)
        logits = logits.masked_fill(~(held_q[part, :, None, None] & held_k), -torch.inf)
        scores = logits.logsumexp((-3, -1))
    return torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _choose(
    scores: torch.Tensor,
    factor: float,
    threshold: torch.Tensor | None,
    count: torch.Tensor | None,
    share: torch.Tensor | None,
    pooled: torch.Tensor | None,
    ranked: torch.Tensor | None,
    forced: torch.Tensor | None,
) -> torch.Tensor:
    """The listed blocks of some rows: bool [B, H, rows, key blocks].

    Args:
        scores: [B, H, rows, key blocks].
        factor: makes logits of them.
        threshold, count, share: [B, H, rows].
        pooled, ranked: bool [B, H, rows] and [B, H, key blocks], blocks that are similar enough.
        forced: bool [rows, key blocks].
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if threshold is not None:
        chosen |= scores > threshold[..., None]
    if pooled is not None and ranked is not None:
        scores = scores.masked_fill(~ranked[..., None, :], -torch.inf)
        chosen |= ~(ranked[..., None, :] & pooled[..., None])
    if count is not None:
        chosen |= best(scores, None, count)
    if share is not None:
        highest = scores.amax(-1, keepdim=True)
        mass = torch.where(scores == highest, 1.0, (factor * (scores - highest)).exp())
        chosen |= best(scores, mass, torch.where(share < 1, share * mass.sum(-1), torch.inf))
    if forced is not None:
        chosen |= forced
    first = scores.argmax(-1, keepdim=True)
    return chosen | torch.zeros_like(chosen).scatter(-1, first, ~chosen.any(-1, keepdim=True))


def best(scores: torch.Tensor, weights: torch.Tensor | None, target: torch.Tensor | int) -> torch.Tensor:
    """The fewest best entries of each row whose weights reach a target; all if the row does not reach it.

    The score of the last one is found bit by bit. Of equal scores the first count.

    Args:
        scores: fp32 or fp64 [..., n] without NaN.
        weights: [..., n], not negative; None: 1 each.
        target: [...], or one for all rows.

    Returns:
        bool [..., n].
    """
    integer, bits = (torch.int64, 64) if scores.dtype == torch.float64 else (torch.int32, 32)
    lowest = -(1 << (bits - 1))
    keys = (scores + 0.0).view(integer)  # -0 + 0 is 0
    keys = torch.where(keys < 0, keys ^ ~lowest, keys)

    def weight_of(marked: torch.Tensor) -> torch.Tensor:
        return marked.sum(-1) if weights is None else torch.where(marked, weights, 0).sum(-1)

    level = torch.full_like(keys[..., 0], lowest)
    for bit in reversed(range(bits)):
        tried = level ^ (lowest if bit == bits - 1 else 1 << bit)
        level = torch.where(weight_of(keys >= tried[..., None]) >= target, tried, level)
    above, tied = keys > level[..., None], keys == level[..., None]
    missing = target - weight_of(above)
    tied_weights = tied.to(keys.dtype) if weights is None else torch.where(tied, weights, 0)
    return above | (tied & (tied_weights.cumsum(-1) - tied_weights < missing[..., None]))


def lists_of(chosen: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The marked blocks of each row, ascending, 0 behind them: int32 [..., width]; and their number, int32 [...]."""
    place = chosen.cumsum(-1).sub_(1)
    blocks = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    lists = blocks.new_zeros(*chosen.shape[:-1], width + 1)
    lists.scatter_(-1, torch.where(chosen, place, width), blocks)
    lists[..., width] = 0
    return lists[..., :width], chosen.sum(-1, dtype=torch.int32)
