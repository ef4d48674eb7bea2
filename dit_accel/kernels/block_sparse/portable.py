"""Block-sparse attention in PyTorch alone, on any device: listed blocks are gathered and computed, the rest skipped.

Lists shared by all heads: query blocks with equal or similar lists are grouped once per plan (`prepare`), the keys of a
group are gathered once per call, and the group is one dense problem, masked only where a pair inside it is forbidden.
Lists per head: `routed`. Every query is in one group, so that nothing needs merging afterwards.

Memory beyond inputs and outputs: one sample's q, k and v in fp32 (and their gradients), `CHUNK_BYTES` of gathered rows,
`dense.CPU_LOGITS` or `dense.DEVICE_LOGITS` logits, one batch's mask of at most `grouping.MAX_PAIRS` pairs; and what
`prepare` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dit_accel.kernels.block_sparse import dense, routed
from dit_accel.kernels.block_sparse.geometry import Geometry, Layout, query_layout, read_layouts
from dit_accel.kernels.block_sparse.prepare import Batch, PreparationCache
from dit_accel.kernels.block_sparse.rows import add_rows, empty_output, gather, heads_first, parts, zeros_spread

CHUNK_BYTES = 64 << 20

preparations = PreparationCache()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    kv_indices: torch.Tensor, kv_counts: torch.Tensor, partial: torch.Tensor | None, tables: torch.Tensor | None,
    visual_start: torch.Tensor | None, reference_start: torch.Tensor | None, text_start: torch.Tensor | None,
    text_len: torch.Tensor | None, geometry: Sequence[int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [B, H, Nq, D], in memory [B, Nq, H, D], and LSE [B, H, Nq]; arguments as the custom op's."""
    shape = Geometry.unpack(geometry)
    layouts = read_layouts(shape, len(q), k.shape[2], visual_start, reference_start, text_start, text_len)
    if kv_indices.ndim == 4:
        return routed.forward(q, k, v, kv_indices, kv_counts, partial, tables, shape, layouts, scale)
    out, lse = empty_output(q)
    batches = preparations.get(kv_indices, kv_counts, partial, tables, shape, q.device)
    for b, layout in enumerate(layouts):
        queries, keys, values = (heads_first(x[b]) for x in (q, k, v))
        for rows_q, rows_k, bias in _problems(batches, shape, layout, queries):
            gq, gk, gv = gather(queries, rows_q), gather(keys, rows_k), gather(values, rows_k)
            groups, count = rows_q.shape
            sums = gq.new_empty(gq.shape[:3])
            part = q.new_empty(groups, count, *q.shape[1::2])
            heads_of_part = part.permute(2, 0, 1, 3)
            for at in parts(gq):
                heads_of_part[at], sums[at] = dense.forward(gq[at], gk[at], gv[at], bias, scale)
            out[b].transpose(0, 1).index_copy_(0, rows_q.flatten(), part.flatten(0, 1))
            lse[b].index_copy_(1, rows_q.flatten(), sums.flatten(1))
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    kv_indices: torch.Tensor, kv_counts: torch.Tensor, partial: torch.Tensor | None, tables: torch.Tensor | None,
    visual_start: torch.Tensor | None, reference_start: torch.Tensor | None, text_start: torch.Tensor | None,
    text_len: torch.Tensor | None, geometry: Sequence[int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, in memory [B, N, H, D]; arguments as the custom op's."""
    shape = Geometry.unpack(geometry)
    layouts = read_layouts(shape, len(q), k.shape[2], visual_start, reference_start, text_start, text_len)
    if kv_indices.ndim == 4:
        return routed.backward(
            grad_out, grad_lse, q, k, v, out, kv_indices, kv_counts, partial, tables, shape, layouts, scale
        )
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    batches = preparations.get(kv_indices, kv_counts, partial, tables, shape, q.device)
    for b, layout in enumerate(layouts):
        upstream, queries, keys, values = (heads_first(x[b]) for x in (grad_out, q, k, v))
        delta = (upstream * heads_first(out[b])).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[b]
        sums = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for rows_q, rows_k, bias in _problems(batches, shape, layout, queries):
            go, gd, gq = gather(upstream, rows_q), gather(delta, rows_q), gather(queries, rows_q)
            gk, gv = gather(keys, rows_k), gather(values, rows_k)
            results = torch.empty_like(gq), torch.empty_like(gk), torch.empty_like(gv)
            for at in parts(gq):
                gradients = dense.backward(go[at], gd[at], gq[at], gk[at], gv[at], bias, scale)
                for result, gradient in zip(results, gradients, strict=True):
                    result[at] = gradient
            for total, rows, result in zip(sums, (rows_q, rows_k, rows_k), results, strict=True):
                add_rows(total, rows, result)
        for grad, total in zip(grads, sums, strict=True):
            grad[b] = total
    return grads


def _problems(
    batches: list[Batch], geometry: Geometry, layout: Layout, queries: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """A sample's dense problems: query rows [G, nq], key rows [G, nk], bias [nq, nk] or None."""
    grid_q, grid_k = geometry.query_order.grid, geometry.key_order.grid
    place_q = query_layout(geometry, layout).positions(grid_q.visual, grid_q.reference, grid_q.text)
    place_k = layout.positions(grid_k.visual, grid_k.reference, grid_k.text)
    valid_end = grid_k.visual + grid_k.reference + layout.text_len
    place_q, place_k = place_q.to(queries.device), place_k.to(queries.device)
    row_bytes = queries.shape[0] * queries.shape[2] * queries.element_size()
    for batch in batches:
        keys, bias = batch.k, batch.mask()
        if layout.text_len < geometry.text:
            valid = int((keys[0] < valid_end).sum())
            keys, bias = keys[:, :valid], None if bias is None else bias[:, :valid]
            if not valid:
                continue
        groups = max(1, CHUNK_BYTES // (row_bytes * (batch.q.shape[1] + 2 * keys.shape[1])))
        for rows_q, rows_k in zip(batch.q.split(groups), keys.split(groups), strict=True):
            yield place_q[rows_q], place_k[rows_k], bias
