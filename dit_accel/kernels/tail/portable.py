"""The tail in plain PyTorch, on any device: dense attention over the pseudo-keys, in runs of queries, merged by LSE."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import dense
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, empty_rows
from dit_accel.kernels.sla.portable import block_means
from dit_accel.kernels.tail.call import TailCall
from dit_accel.kernels.tail.reference import in_tail
from dit_accel.order import TokenOrder, valid_tokens


def forward(call: TailCall) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`."""
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    out, lse = empty_rows(exact), exact_lse.new_empty(exact_lse.shape)
    tail = _Tail.of(k, v, geometry)
    for at, rows, bias, blind in _parts(q, lists, dropped, tail, geometry):
        part = dense.forward(q[at][:, :, rows].to(tail.wide), tail.keys[at], tail.values[at], bias, blind, scale)
        merged = dense.merge(exact[at][:, :, rows], exact_lse[at][:, :, rows].to(tail.wide), *part)
        out[at][:, :, rows], lse[at][:, :, rows] = merged
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: TailCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`; README.md has the equations."""
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    tail = _Tail.of(k, v, geometry)
    of_keys, of_values = torch.zeros_like(tail.keys), torch.zeros_like(tail.values)
    dq, dexact, dexact_lse = empty_rows(q), empty_rows(exact), exact_lse.new_empty(exact_lse.shape)
    for at, rows, bias, _ in _parts(q, lists, dropped, tail, geometry):
        queries, upstream, result, own, sums = (x[at][:, :, rows].to(tail.wide) for x in (q, grad_out, out, exact, lse))
        upstream_lse = None if grad_lse is None else grad_lse[at][:, :, rows].to(tail.wide)
        delta = (upstream * result).sum(-1)
        if upstream_lse is not None:
            delta -= upstream_lse
        # a row without keys has a share of 0
        share = torch.exp(exact_lse[at][:, :, rows].to(tail.wide) - sums.masked_fill(sums == -torch.inf, torch.inf))
        dexact[at][:, :, rows] = upstream * share[..., None]
        dexact_lse[at][:, :, rows] = share * ((upstream * own).sum(-1) - delta)
        dq[at][:, :, rows], grad_k, grad_v = dense.backward(
            upstream, upstream_lse, queries, tail.keys[at], tail.values[at], result, sums, bias, scale
        )
        of_keys[at] += grad_k
        of_values[at] += grad_v
    dk, dv = (spread((x / tail.held).to(q.dtype), geometry.key_order) for x in (of_keys, of_values))
    return dq, dk, dv, dexact, dexact_lse


class _Tail(NamedTuple):
    """Pseudo-keys of a call: keys and values [B, H, blocks, D], tokens of each block [blocks, 1]."""

    keys: Tensor
    values: Tensor
    held: Tensor
    wide: torch.dtype

    @classmethod
    def of(cls, k: Tensor, v: Tensor, geometry: Geometry) -> _Tail:
        wide, order = dense.accumulation(k.dtype), geometry.key_order
        held = valid_tokens(order).to(k.device, wide)[:, None]
        return cls(block_means(k, order), block_means(v, order), held, wide)


def _parts(
    q: Tensor, lists: BlockLists, dropped: Tensor | None, tail: _Tail, geometry: Geometry
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Sample, rows, bias [1, H, rows, key blocks] and blind rows [1, H, rows], as `dense.forward` takes them.

    The bias is the log of the block's tokens, and -inf outside the tail.
    """
    block_of, weight = _query_blocks(geometry.query_order, q.device), tail.held[:, 0].log()
    step = max(1, dense.logits_at_once(q.device) // (q.shape[1] * len(weight)))
    for b in range(len(q)):
        at = slice(b, b + 1)
        skipped = None if dropped is None else dropped[at]
        within = in_tail(BlockLists(lists.indices[at], lists.counts[at]), skipped, len(weight))
        bias, blind = torch.where(within, weight, -torch.inf), ~within.any(-1)
        for first in range(0, q.shape[2], step):
            rows = slice(first, first + step)
            yield at, rows, bias.index_select(2, block_of[rows]), blind.index_select(2, block_of[rows])


@functools.lru_cache(maxsize=16)
def _query_blocks(order: TokenOrder, device: torch.device) -> Tensor:
    return order.block_of_token().to(device)


def spread(x: Tensor, order: TokenOrder) -> Tensor:
    """A value a block [B, H, blocks, D] for each of its tokens: [B, H, visual, D], in memory [B, visual, H, D]."""
    return x.transpose(1, 2).index_select(1, _query_blocks(order, x.device)).transpose(1, 2)
