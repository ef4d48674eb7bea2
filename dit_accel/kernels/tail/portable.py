"""The tail in plain PyTorch, on any device: a head at a time, in runs of queries whose logits stay in cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.dense import accumulation, logits_at_once, product
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.kernels.block_sparse.reference import block_of_token
from dit_accel.kernels.sla.portable import block_means
from dit_accel.kernels.tail.reference import in_tail
from dit_accel.order import TokenOrder, valid_tokens


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    lists: BlockLists,
    dropped: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`."""
    out = _empty_rows(exact)
    lse = exact_lse.new_empty(exact_lse.shape)
    tail = _Tail.of(k, v, geometry, scale)
    for at, rows, bias in _parts(q, lists, dropped, tail, geometry):
        queries = q[at][rows].to(tail.wide)
        logits = product(queries, tail.keys[at].mT).add_(bias)
        exact_logit = exact_lse[at][rows].to(tail.wide)
        top = torch.maximum(logits.amax(-1), exact_logit)
        top.masked_fill_(top == -torch.inf, 0.0)  # a row without keys
        weights, share = logits.sub_(top[:, None]).exp_(), exact_logit.sub(top).exp_()
        total = weights.sum(-1).add_(share)
        result = product(weights, tail.values[at]).addcmul_(exact[at][rows].to(tail.wide), share[:, None])
        out[at][rows] = result.div_(total.where(total > 0, 1.0)[:, None])
        lse[at][rows] = total.log_().add_(top)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    exact_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    dropped: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`; README.md has the equations."""
    tail = _Tail.of(k, v, geometry, scale)
    of_keys, of_values = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in tail[:2])
    dq, dexact, dexact_lse = _empty_rows(q), _empty_rows(exact), exact_lse.new_empty(exact_lse.shape)
    for at, rows, bias in _parts(q, lists, dropped, tail, geometry):
        queries, upstream, result, own = (x[at][rows].to(tail.wide) for x in (q, grad_out, out, exact))
        sums = lse[at][rows].to(tail.wide)
        sums = sums.masked_fill(sums == -torch.inf, torch.inf)  # a row without keys has weights of 0
        delta = (upstream * result).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[at][rows]
        share = torch.exp(exact_lse[at][rows].to(tail.wide) - sums)
        dexact[at][rows] = upstream * share[:, None]
        dexact_lse[at][rows] = share * ((upstream * own).sum(-1) - delta)
        weights = product(queries, tail.keys[at].mT).add_(bias).sub_(sums[:, None]).exp_()
        of_values[at] += product(upstream.mT, weights)
        of_logits = product(upstream, tail.values[at].mT).sub_(delta[:, None]).mul_(weights)
        dq[at][rows] = product(of_logits, tail.keys[at])
        of_keys[at] += product(queries.mT, of_logits)
    dk, dv = (spread((x.mT / tail.held).to(q.dtype), geometry.key_order) for x in (of_keys.mul_(scale), of_values))
    return dq, dk, dv, dexact, dexact_lse


class _Tail(NamedTuple):
    """Pseudo-keys of a call: keys times the scale and values [B, H, blocks, D], tokens of each block [blocks, 1]."""

    keys: Tensor
    values: Tensor
    held: Tensor
    wide: torch.dtype

    @classmethod
    def of(cls, k: Tensor, v: Tensor, geometry: Geometry, scale: float) -> _Tail:
        wide, order = accumulation(k.dtype), geometry.key_order
        held = valid_tokens(order).to(k.device, wide)[:, None]
        return cls(block_means(k, order) * scale, block_means(v, order), held, wide)


def _parts(
    q: Tensor, lists: BlockLists, dropped: Tensor | None, tail: _Tail, geometry: Geometry
) -> Iterator[tuple[tuple[int, int], slice, Tensor]]:
    """Sample and head, rows, and the bias [rows, key blocks]: log of the block's tokens, -inf outside the tail."""
    block_of, weight = _query_blocks(geometry.query_order, q.device), tail.held[:, 0].log()
    step = max(1, logits_at_once(q.device) // len(weight))
    for at in itertools.product(range(q.shape[0]), range(q.shape[1])):
        skipped = None if dropped is None else dropped[at]
        within = in_tail(BlockLists(lists.indices[at], lists.counts[at]), skipped, len(weight))
        bias = torch.where(within, weight, -torch.inf)
        for first in range(0, q.shape[2], step):
            rows = slice(first, first + step)
            yield at, rows, bias.index_select(0, block_of[rows])


@functools.lru_cache(maxsize=16)
def _query_blocks(order: TokenOrder, device: torch.device) -> Tensor:
    return block_of_token(order.index(), order.block).to(device)


def spread(x: Tensor, order: TokenOrder) -> Tensor:
    """A value a block [B, H, blocks, D] for each of its tokens: [B, H, visual, D], in memory [B, visual, H, D]."""
    return x.transpose(1, 2).index_select(1, _query_blocks(order, x.device)).transpose(1, 2)


def _empty_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
