"""Where a block's mean may stand for its tokens: the gate of Rectified SpaAttn."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.dense import logits_at_once
from dit_accel.kernels.cuts import Cut, block_means, to_blocks, visual_of
from dit_accel.order import TokenOrder, valid_tokens


@torch.no_grad()
def trusted(q: Tensor, k: Tensor, query_order: TokenOrder, key_order: TokenOrder) -> Tensor:
    """Pairs of blocks whose score exceeds what their tokens' deviations could change: bool [B, H, queries, keys].

    Blocks have means q_i and k_j, and a_i and b_j are their tokens' mean absolute deviations. A pair is trusted if
    ``|q_i . k_j| > |a_i . k_j| + |q_i . b_j|``. A score that is not a number is not trusted.

    Source: Rectified SpaAttn (arXiv 2511.19835), its gain-aware pooling rectification (GAPR).

    Args:
        q, k: the whole sequence [B, H, N, D] in model order.
        query_order, key_order: how the visual tokens are cut into blocks; of one grid.
    """
    queries, keys = visual_of(q, query_order.grid), visual_of(k, key_order.grid)
    rows, columns = Cut.of(query_order).order, Cut.of(key_order).order
    # maps of scores, and the deviations of all tokens, exist for some heads at a time
    largest = q.shape[0] * max(rows.blocks * columns.blocks, queries[0, 0].numel())
    step, found = max(1, 4 * logits_at_once(q.device) // largest), []
    for some in (slice(first, first + step) for first in range(0, q.shape[1], step)):
        query, of_query = _pooled(queries[:, some], rows)
        key, of_key = _pooled(keys[:, some], columns)
        slack = (of_query @ key.mT).abs_() + (query @ of_key.mT).abs_()
        found.append((query @ key.mT).abs_() > slack)
    return torch.cat(found, 1)


def _pooled(x: Tensor, order: TokenOrder) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation of every block's tokens: [B, H, blocks, D] each, fp32 or fp64."""
    means, held = block_means(x, order), valid_tokens(order).to(x.device)[:, None]
    slots = to_blocks(x.to(means.dtype), order).sub(means[..., None, :]).abs_()
    # a padding slot is 0 and deviates by the mean
    padding = (order.block - held) * means.abs()
    return means, (slots.sum(-2) - padding) / held
