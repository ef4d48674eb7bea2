"""The definition of the router, in fp32 or fp64: scores of all pairs of blocks, sorted row by row."""

from __future__ import annotations

import torch

from dit_accel.kernels.router.rule import VARIANCE_FLOOR, RouterArguments
from dit_accel.order import TokenOrder


def route(q: torch.Tensor, k: torch.Tensor, call: RouterArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.router.api.route`.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D].

    Returns:
        The lists, int32 [B, H, query blocks, width], 0 behind a row's count. The counts, int32 [B, H, query blocks].
        The `skip` blocks that rank lowest, int32 [B, H, query blocks, skip].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    orders = call.query_order, call.key_order
    (queries, has_q), (keys, has_k) = (
        _means(x.to(wide), order, call.cells) for x, order in zip((q, k), orders, strict=True)
    )
    queries = torch.where(queries.isfinite(), queries, 0)  # else all scores of a row are NaN, and none stands out
    if call.cells == 1:
        scores = queries[..., 0, :] @ keys[..., 0, :].mT
    else:
        logits = torch.einsum("bhiad,bhjcd->bhijac", queries, keys) * call.scale
        both = has_q[:, None, :, None] & has_k[None, :, None, :]
        scores = logits.masked_fill(~both, -torch.inf).flatten(-2).logsumexp(-1)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if call.tau is not None:
        products = queries[..., 0, :].unsqueeze(-2) * keys[..., 0, :].unsqueeze(-3)  # [B, H, i, j, D]
        variance = products.sum(-1).var(-1, correction=0) if call.exact else products.var(-2, correction=0).sum(-1)
        deviation = (call.scale**2 * variance + VARIANCE_FLOOR).sqrt() / call.scale
        chosen |= scores > (scores.mean(-1) + call.tau * deviation)[..., None]
    if call.similarity is not None:
        similar_q, similar_k = (
            _similarity(x.to(wide), order) > call.similarity for x, order in zip((q, k), orders, strict=True)
        )
        scores = scores.masked_fill(~similar_k[..., None, :], -torch.inf)
        chosen |= ~similar_k[..., None, :] | ~similar_q[..., None]
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    if call.counts is not None:
        chosen |= rank < call.counts[..., None]
    if call.shares is not None:
        mass = torch.where(ranked == ranked[..., :1], 1, (call.factor * (ranked - ranked[..., :1])).exp())
        before = mass.cumsum(-1) - mass
        short = before < call.shares[..., None] * mass.sum(-1, keepdim=True)
        chosen |= (short | (call.shares[..., None] >= 1)).gather(-1, rank)
    if call.forced is not None:
        chosen |= call.forced
    chosen |= ~chosen.any(-1, keepdim=True) & (rank == 0)
    worst, _ = _lists(rank >= rank.shape[-1] - call.skip, call.skip)
    return *_lists(chosen, call.width), worst


def _lists(chosen: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Marked blocks as lists, int32 [B, H, query blocks, width], and their counts."""
    counts = chosen.sum(-1, dtype=torch.int32)
    listed = (~chosen).byte().sort(dim=-1, stable=True).indices[..., :width]
    return torch.where(torch.arange(width, device=chosen.device) < counts[..., None], listed, 0).int(), counts


def _blocks(x: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of every block, [B, H, blocks, block, D], padding as 0, and which of them hold a token."""
    index = order.index().to(x.device).view(order.visual_blocks, order.block)
    held = index >= 0
    return torch.where(held[..., None], x[:, :, index.clamp(min=0)], 0), held


def deviations(x: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.router.api.deviations`; x are visual tokens in raster order, [B, H, visual, D]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    block = order.block_of_visual(x.device)
    held = torch.bincount(block, minlength=order.visual_blocks)[:, None]

    def means(y: torch.Tensor) -> torch.Tensor:
        return y.new_zeros(*y.shape[:2], order.visual_blocks, y.shape[3]).index_add(2, block, y) / held

    centre = means(x)
    return centre, means((x - centre[:, :, block]).abs())


def _means(x: torch.Tensor, order: TokenOrder, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the tokens of every cell, [B, H, blocks, cells, D], and which cells have any."""
    slots, held = _blocks(x, order)
    count = held.unflatten(-1, (cells, -1)).sum(-1)
    return slots.unflatten(-2, (cells, -1)).sum(-2) / count.clamp(min=1)[..., None], count > 0


def _similarity(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean over all pairs of a block's tokens of the cosine between them: [B, H, blocks]."""
    slots, held = _blocks(torch.nn.functional.normalize(x, dim=-1), order)
    return (slots @ slots.mT).sum((-2, -1)) / held.sum(-1) ** 2
