"""Rectified SpaAttn (arXiv 2511.19835) in plain PyTorch: the tail's gate, and compensation by pooled probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.dense import logits_at_once
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.cuts import block_means, visual_of
from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.kernels.router.api import deviations
from dit_accel.kernels.tail.portable import spread
from dit_accel.kernels.tail.reference import in_tail
from dit_accel.order import TokenOrder, valid_tokens


@torch.no_grad()
def trusted(q: Tensor, k: Tensor, query_order: TokenOrder, key_order: TokenOrder, *, impl: Impl = AUTO) -> Tensor:
    """Pairs of blocks whose score exceeds what their tokens' deviations could change: bool [B, H, queries, keys].

    Blocks have means q_i and k_j, and a_i and b_j are their tokens' mean absolute deviations. A pair is trusted if
    ``|q_i . k_j| > |a_i . k_j| + |q_i . b_j|``. A score that is not a number is not trusted.

    Source: Rectified SpaAttn (arXiv 2511.19835), its gain-aware pooling rectification (GAPR).

    Args:
        q, k: the whole sequence [B, H, N, D] in model order.
        query_order, key_order: how the visual tokens are cut into blocks; of one grid.
        impl: as of `router.api.route`.
    """
    # maps of scores, and the deviations of all tokens, exist for some heads at a time
    largest = q.shape[0] * max(
        query_order.visual_blocks * key_order.visual_blocks, query_order.grid.visual * q.shape[3]
    )
    step, parts = max(1, 4 * logits_at_once(q.device) // largest), []
    for some in (slice(first, first + step) for first in range(0, q.shape[1], step)):
        query, of_query = deviations(q[:, some], query_order, impl=impl)
        key, of_key = deviations(k[:, some], key_order, impl=impl)
        slack = (of_query @ key.mT).abs_() + (query @ of_key.mT).abs_()
        parts.append((query @ key.mT).abs_() > slack)
    return torch.cat(parts, 1)


def compensated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    lists: BlockLists,
    dropped: Tensor | None,
    query_order: TokenOrder,
    key_order: TokenOrder,
    text_lens: Tensor | None,
    scale: float,
) -> Tensor:
    """``R_i * exact + sum over the tail of p_ij * mean(V_j)``, one R and one sum for all rows of query block i.

    p_i is a softmax of the mean query of block i. It goes over the mean keys, each with the weight of its block's
    tokens, and over every conditioning and text key (isolated pooling). R_i is the part of p_i outside the tail.
    Differentiable.

    Source: Rectified SpaAttn (arXiv 2511.19835).

    Args:
        q, k, v: the whole sequence [B, H, N, D] in model order.
        exact: attention of the visual queries over listed blocks, conditioning and text, [B, H, visual, D].
        lists, dropped, query_order, key_order: as in `api.with_tail`.
        text_lens: int [B], valid text tokens; None: all.
        scale: factor of the logits.

    Returns:
        [B, H, visual, D], in the dtype of q.
    """
    grid = key_order.grid
    queries, keys = (block_means(visual_of(x, grid), order) for x, order in ((q, query_order), (k, key_order)))
    sizes = valid_tokens(key_order, q.device).to(keys.dtype)
    logits = queries @ keys.mT * scale + sizes.log()
    place = torch.arange(grid.tokens, device=q.device)
    around = (place < grid.visual_start) | (place >= grid.visual_start + grid.visual)
    hidden = torch.zeros(1, grid.tokens, dtype=torch.bool, device=q.device)
    if text_lens is not None:
        text = place - grid.text_start
        hidden = (text >= text_lens.to(q.device)[:, None]) & (text < grid.text)
    others = k.masked_fill(hidden[:, None, :, None], 0)[:, :, around].to(keys.dtype)
    text_logits = (queries @ others.mT * scale).masked_fill(hidden[:, None, None, around], -torch.inf)
    shares = torch.cat([logits, text_logits], -1).softmax(-1)[..., : keys.shape[2]]
    shares = shares * in_tail(lists, dropped, key_order.visual_blocks)
    ratio = 1 - shares.sum(-1, keepdim=True)
    values = block_means(visual_of(v, grid), key_order)
    ratio, rest = (spread(x, query_order) for x in (ratio, shares @ values))
    return (ratio * exact + rest).to(q.dtype)
