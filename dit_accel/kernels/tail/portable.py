"""The tail in plain PyTorch, on any device: dense attention over the pseudo-keys, in runs of queries, merged by LSE."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import dense
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, empty_rows
from dit_accel.kernels.cuts import block_means, contiguous_rows, to_blocks
from dit_accel.kernels.tail.reference import TailInputs, in_tail
from dit_accel.order import TokenOrder, valid_tokens


def forward(call: TailInputs) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`."""
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    out, lse = empty_rows(exact), exact_lse.new_empty(exact_lse.shape)
    tail = _Tail.of(k, v, geometry)
    for at, of, bias, blind in _parts(q, lists, dropped, tail, geometry):
        queries, merged, merged_lse = of(q).to(tail.wide), of(out).copy_(of(exact)), of(lse).copy_(of(exact_lse))
        keys, values = (x[at].expand(len(queries), -1, -1, -1) for x in (tail.keys, tail.values))
        dense.merge(merged, merged_lse, *dense.forward(queries, keys, values, bias, blind, scale))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: TailInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `api.tail_backward`; README.md has the equations."""
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    grad_out, tail = contiguous_rows(grad_out), _Tail.of(k, v, geometry)
    of_keys, of_values = torch.zeros_like(tail.keys), torch.zeros_like(tail.values)
    dq, dexact, dexact_lse = empty_rows(q), empty_rows(exact), exact_lse.new_empty(exact_lse.shape)
    for at, of, bias, _ in _parts(q, lists, dropped, tail, geometry):
        queries, upstream, result, of_exact, sums = (of(x).to(tail.wide) for x in (q, grad_out, out, exact, lse))
        keys, values = (x[at].expand(len(queries), -1, -1, -1) for x in (tail.keys, tail.values))
        upstream_lse = None if grad_lse is None else of(grad_lse).to(tail.wide)
        delta = (upstream * result).sum(-1)
        if upstream_lse is not None:
            delta -= upstream_lse
        # a row without keys has a share of 0
        share = torch.exp(of(exact_lse).to(tail.wide) - sums.masked_fill(sums == -torch.inf, torch.inf))
        of(dexact).copy_(upstream * share[..., None])
        of(dexact_lse).copy_(share * ((upstream * of_exact).sum(-1) - delta))
        grad_q, grad_k, grad_v = dense.backward(
            upstream, upstream_lse, queries, keys, values, result, sums, bias, scale
        )
        of(dq).copy_(grad_q)
        of_keys[at] += grad_k.sum(0)
        of_values[at] += grad_v.sum(0)
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
        wide, order = torch.promote_types(k.dtype, torch.float32), geometry.key_order
        held = valid_tokens(order, k.device).to(wide)[:, None]
        return cls(block_means(k, order), block_means(v, order), held, wide)


def _parts(
    q: Tensor, lists: BlockLists, dropped: Tensor | None, tail: _Tail, geometry: Geometry
) -> Iterator[tuple[slice, Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """Sample, a view [G, H, n, ...] of a tensor [B, H, visual, ...], bias [G, H, n, key blocks] and blind rows.

    The bias is the log of the block's tokens, and -inf outside the tail. Blocks of queries that are runs are problems
    of their own, whose rows share a bias; others are not.
    """
    order, visual, weight = geometry.query_order, q.shape[2], tail.held[:, 0].log()
    step = max(1, dense.logits_at_once(q.device) // (q.shape[1] * len(weight)))
    runs, block_of = 0 if order.tile else visual // order.block, order.block_of_visual(q.device)
    for b in range(len(q)):
        at = slice(b, b + 1)
        skipped = None if dropped is None else dropped[at]
        within = in_tail(BlockLists(lists.indices[at], lists.counts[at]), skipped, len(weight))
        bias, blind = torch.where(within, weight, -torch.inf), ~within.any(-1)
        blocks = max(1, step // order.block)
        for first in range(0, runs, blocks):
            some = slice(first, min(first + blocks, runs))
            rows = slice(some.start * order.block, some.stop * order.block)
            biases = bias[0, :, some, None].expand(-1, -1, order.block, -1).transpose(0, 1)
            yield at, functools.partial(_runs, b, rows, order.block), biases, blind[0, :, some, None].transpose(0, 1)
        for first in range(runs * order.block, visual, step):
            rows = slice(first, first + step)
            of_rows = block_of[rows]
            yield at, functools.partial(_rows, at, rows), bias.index_select(2, of_rows), blind.index_select(2, of_rows)


def _runs(b: int, rows: slice, block: int, x: Tensor) -> Tensor:
    return x[b, :, rows].unflatten(1, (-1, block)).transpose(0, 1)


def _rows(at: slice, rows: slice, x: Tensor) -> Tensor:
    return x[at][:, :, rows]


def spread(x: Tensor, order: TokenOrder) -> Tensor:
    """A value a block [B, H, blocks, D] for each of its tokens: [B, H, visual, D], in memory [B, visual, H, D]."""
    return x.transpose(1, 2).index_select(1, order.block_of_visual(x.device)).transpose(1, 2)


def correction(q: Tensor, k: Tensor, v: Tensor, key_order: TokenOrder, scale: float) -> Tensor:
    """What the first-order term adds to a row of pure tail: [B, H, visual, D], fp32 or fp64. Differentiable.

    To first order, a block's sum of exp(logit) * value has the further term ``scale * p * q (K - mean)^T V``. PISA puts
    one matrix for all blocks in place of each block's own: its mean over the tokens. So a tail of mass g adds
    ``scale * g * q H / N``. With the tail normalised by its mass, g cancels.

    Source: PISA (arXiv 2602.01077); xie-lab-ml/piecewise-sparse-attention.

    Args:
        q, k, v: visual tokens [B, H, visual, D].
        key_order: how they are cut; of a grid of visual tokens alone.
        scale: of the logits.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # a padding slot has a value of 0
    centred = to_blocks(k.to(wide), key_order) - block_means(k, key_order)[..., None, :]
    matrix = centred.to(k.dtype).flatten(-3, -2).mT @ to_blocks(v, key_order).flatten(-3, -2)
    return q.to(wide) @ (matrix.to(wide) * (scale / key_order.grid.visual))
