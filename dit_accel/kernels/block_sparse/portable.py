"""Block-sparse attention in PyTorch alone, on any device: listed blocks are gathered and computed, the rest skipped.

Lists shared by all heads: query blocks with equal or similar lists are grouped once per plan (`prepare`), the keys of a
group are gathered once per call, and the group is one dense problem, masked only where a pair inside it is forbidden.
Lists per head: `routed`. Every query is in one group, so that nothing needs merging afterwards.

Memory beyond inputs and outputs: one sample's q, k, v and results in fp32, `CHUNK_BYTES` of gathered rows,
`dense.CPU_LOGITS` or `dense.DEVICE_LOGITS` logits, one batch's mask of at most `grouping.MAX_PAIRS` pairs; and what
`prepare` keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dit_accel.kernels.block_sparse import dense, routed
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    Geometry,
    Placement,
    Segments,
    query_placement,
    read_placements,
)
from dit_accel.kernels.block_sparse.prepare import Batch, PreparationCache
from dit_accel.kernels.block_sparse.rows import (
    add_rows,
    empty_output,
    gather,
    heads_first,
    one_by_one,
    write_rows,
    zeros_spread,
)

CHUNK_BYTES = 64 << 20

preparations = PreparationCache()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockLists,
    segments: Segments,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], in memory [B, Nq, H, D], and LSE [B, H, Nq]."""
    places = read_placements(geometry, len(q), k.shape[2], segments)
    if lists.indices.ndim == 4:
        return routed.forward(q, k, v, lists, geometry, places, scale)
    out, lse = empty_output(q)
    batches = preparations.get(lists, geometry, q.device)
    for b, place in enumerate(places):
        queries, keys, values = (heads_first(x[b]) for x in (q, k, v))
        outs, lses = torch.zeros_like(queries), lse[b]
        for at, rows_q, rows_k, bias in _problems(batches, geometry, place, queries):
            part, sums = dense.forward(
                gather(queries[at], rows_q), gather(keys[at], rows_k), gather(values[at], rows_k), bias, scale
            )
            write_rows(outs[at], rows_q, part)
            write_rows(lses[at], rows_q, sums)
        out[b] = outs
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lists: BlockLists,
    segments: Segments,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in memory [B, N, H, D]."""
    places = read_placements(geometry, len(q), k.shape[2], segments)
    if lists.indices.ndim == 4:
        return routed.backward(grad_out, grad_lse, q, k, v, out, lists, geometry, places, scale)
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    batches = preparations.get(lists, geometry, q.device)
    for b, place in enumerate(places):
        upstream, queries, keys, values = (heads_first(x[b]) for x in (grad_out, q, k, v))
        delta = (upstream * heads_first(out[b])).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[b]
        sums = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for at, rows_q, rows_k, bias in _problems(batches, geometry, place, queries):
            dq, dk, dv = dense.backward(
                gather(upstream[at], rows_q), gather(delta[at], rows_q), gather(queries[at], rows_q),
                gather(keys[at], rows_k), gather(values[at], rows_k), bias, scale,
            )  # fmt: skip
            write_rows(sums[0][at], rows_q, dq)
            add_rows(sums[1][at], rows_k, dk)
            add_rows(sums[2][at], rows_k, dv)
        for grad, total in zip(grads, sums, strict=True):
            grad[b] = total
    return grads


def _problems(
    batches: list[Batch], geometry: Geometry, place: Placement, queries: torch.Tensor
) -> Iterator[tuple[int | slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """A sample's dense problems: heads, query rows, key rows, bias [nq, nk] or None.

    On a CPU one head and one group at a time, rows [n], so that a problem stays in cache; elsewhere all heads and as
    many groups as `CHUNK_BYTES` hold, rows [G, n].
    """
    grid_q, grid_k = geometry.query_order.grid, geometry.key_order.grid
    place_q = query_placement(geometry, place).positions(grid_q.visual, grid_q.conditioning, grid_q.text)
    place_k = place.positions(grid_k.visual, grid_k.conditioning, grid_k.text)
    valid_end = grid_k.visual + grid_k.conditioning + place.text_len
    place_q, place_k = place_q.to(queries.device), place_k.to(queries.device)
    row_bytes = queries.shape[0] * queries.shape[2] * queries.element_size()
    for batch in batches:
        keys, bias = batch.k, batch.mask()
        if place.text_len < geometry.text:
            valid = int((keys[0] < valid_end).sum())
            keys, bias = keys[:, :valid], None if bias is None else bias[:, :valid]
            if not valid:
                continue
        rows_q, rows_k = place_q[batch.q], place_k[keys]
        if one_by_one(queries):
            for group, head in itertools.product(range(len(rows_q)), range(len(queries))):
                yield head, rows_q[group], rows_k[group], bias
        else:
            groups = max(1, CHUNK_BYTES // (row_bytes * (rows_q.shape[1] + 2 * rows_k.shape[1])))
            for some_q, some_k in zip(rows_q.split(groups), rows_k.split(groups), strict=True):
                yield slice(None), some_q, some_k, bias
