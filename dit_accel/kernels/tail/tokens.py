"""Single tokens that are attended exactly besides the listed blocks, and leave the tail. README.md has the equations.

PyTorch's own operations on every device, a run of query blocks at a time. There is no Triton kernel of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import dense
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.cuts import block_means, from_blocks, to_blocks, visual_of
from dit_accel.order import TokenOrder


@torch.no_grad()
def best_tokens(
    q: Tensor,
    k: Tensor,
    lists: BlockLists,
    query_order: TokenOrder,
    key_order: TokenOrder,
    count: int,
    scale: float | None = None,
) -> Tensor:
    """The visual tokens outside a query block's listed blocks whose logits with its mean query are highest.

    Args:
        q, k: [B, H, N, D] in model order, any strides; the whole sequence.
        lists: visual key blocks that are attended exactly, int32 [B, H, query blocks, width].
        count: tokens of a query block; fewer if there are not as many.
        scale: factor of the logits; D ** -0.5 if None.

    Returns:
        Places among the visual tokens, int64 [B, H, query blocks, count]; -1 where there is no further token.
    """
    q, k = (visual_of(x, key_order.grid) for x in (q, k))
    scale, means = q.shape[-1] ** -0.5 if scale is None else scale, block_means(q, query_order)
    batch, heads, blocks, _ = means.shape
    keys, block = k.to(means.dtype), key_order.block_of_visual(q.device)
    listed, count = lists.map(lists.used, key_order.visual_blocks), min(count, k.shape[2])
    rows, parts = max(1, dense.logits_at_once(q.device) // (batch * heads * k.shape[2])), []
    for first in range(0, blocks, rows):
        some = slice(first, first + rows)
        scores = means[:, :, some] @ keys.mT * scale
        scores = scores.masked_fill(listed[:, :, some].index_select(-1, block), -torch.inf)
        best, tokens = scores.topk(count)
        parts.append(torch.where(best == -torch.inf, -1, tokens))
    return torch.cat(parts, 2)


def with_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens: Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    *,
    pooled: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the visual queries with single tokens merged into it. Differentiable in q, k, v, `out` and `lse`.

    Args:
        q, k, v: as of `best_tokens`.
        out, lse: attention so far, with or without the tail: [B, H, visual, D], and its natural log-sum-exp.
        tokens: from `best_tokens`.
        pooled: a token's share of its block's pseudo-key is taken out of `out`: the block then weighs a token less.

    Returns:
        Output [B, H, visual, D] in the dtype of `out`, its log-sum-exp, and that of the tokens alone, [B, H, visual].
    """
    scale, dim = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[-1]
    wide, dtype = torch.promote_types(q.dtype, torch.float32), out.dtype
    q, k, v = (visual_of(x, key_order.grid).to(wide) for x in (q, k, v))
    queries, before, sums = (to_blocks(x.to(wide), query_order) for x in (q, out, lse[..., None]))
    pseudo = tuple(block_means(x, key_order) for x in (k, v)) if pooled else ()
    block = key_order.block_of_visual(q.device)
    batch, heads, blocks, size, _ = queries.shape
    rows, parts = max(1, dense.logits_at_once(q.device) // (batch * heads * tokens.shape[-1] * max(size, dim))), []
    for first in range(0, blocks, rows):
        some = slice(first, first + rows)
        chosen, query = tokens[:, :, some], queries[:, :, some]
        absent, place = (chosen < 0)[..., None, :], chosen.clamp(min=0)
        logits = (query @ _rows(k, place).mT * scale).masked_fill(absent, -torch.inf)
        known = sums[:, :, some]
        peak = torch.maximum(known, logits.amax(-1, keepdim=True)).detach()
        peak = torch.where(peak == -torch.inf, 0.0, peak)
        weights, rest = torch.exp(logits - peak), torch.exp(known - peak)
        total, value = rest + weights.sum(-1, keepdim=True), rest * before[:, :, some] + weights @ _rows(v, place)
        if pooled:
            keys, values = (_rows(x, block[place]) for x in pseudo)
            shares = torch.exp((query @ keys.mT * scale).masked_fill(absent, -torch.inf) - peak)
            total, value = total - shares.sum(-1, keepdim=True), value - shares @ values
        # not from the weights, which may all be 0 beside what is known
        parts.append((value / total, total.log() + peak, logits.logsumexp(-1, keepdim=True)))
    result, both, alone = (from_blocks(torch.cat(part, 2), query_order) for part in zip(*parts, strict=True))
    result = result.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return result, both[..., 0].to(lse.dtype), alone[..., 0].to(lse.dtype)


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """Rows of [B, H, n, D] at places [B, H, r, E]: [B, H, r, E, D]."""
    flat = place.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, place.shape[2:])
