"""Where the tail is most wrong: the errors by which SVG-EAR routes."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.dense import logits_at_once
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.cuts import block_means, to_blocks, visual_of
from dit_accel.kernels.router.portable import best, lists_of
from dit_accel.order import TokenOrder


@torch.no_grad()
def tail_errors(
    q: Tensor, k: Tensor, v: Tensor, query_order: TokenOrder, key_order: TokenOrder, scale: float
) -> Tensor:
    """The error per pair that a pseudo-key makes for a mean query: fp32 or fp64 [B, H, query blocks, key blocks].

    README.md has the equation (4). A row is scaled so that its largest weight is 1: only its ranks mean something.

    Args:
        q, k, v: the whole sequence [B, H, N, D] in model order.
        query_order, key_order: how the visual tokens are cut into blocks; of one grid.
        scale: factor of the logits.
    """
    queries, keys, values = (visual_of(x, key_order.grid) for x in (q, k, v))
    queries = block_means(queries, query_order)
    pseudo, means = block_means(keys, key_order), block_means(values, key_order)
    there = to_blocks(means.new_ones(key_order.grid.visual, 1), key_order)[..., 0]  # 1; 0 in a slot without a token
    slots = (to_blocks(values.to(means.dtype), key_order) - means[..., None, :]) * there[..., None]
    spread, slant = slots.square().sum(-1), (slots @ means[..., None])[..., 0]
    size = means.square().sum(-1, keepdim=True) * there
    flat = to_blocks(keys.to(means.dtype), key_order).flatten(-3, -2).mT
    step = max(1, logits_at_once(q.device) // (q.shape[0] * q.shape[1] * flat.shape[-1]))
    errors = []
    for some in queries.split(step, 2):
        logits = (some @ flat * scale).unflatten(-1, (-1, key_order.block)).masked_fill_(there == 0, -torch.inf)
        top = logits.amax((-1, -2))[..., None]
        at_mean = (some @ pseudo.mT * scale - top).exp_()[..., None]
        weight = logits.sub_(top[..., None]).exp_()
        gap = weight - at_mean
        error = gap.square() * size[..., None, :, :]
        error.add_(gap.mul_(weight).mul_(slant[..., None, :, :]), alpha=2)
        error.add_(weight.square_().mul_(spread[..., None, :, :]))
        errors.append(error.sum(-1) / there.sum(-1))
    return torch.cat(errors, 2)


def most_wrong(errors: Tensor, lists: BlockLists) -> BlockLists:
    """As many blocks of every row as `lists` has, those with the largest errors; the first of equal ones."""
    chosen = best(errors.nan_to_num(nan=torch.inf, posinf=torch.inf), None, lists.counts)
    return BlockLists(*lists_of(chosen, lists.indices.shape[-1]))
