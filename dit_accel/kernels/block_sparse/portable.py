"""Block-sparse attention in PyTorch alone, on any device: listed blocks are gathered and computed, the rest skipped.

Lists shared by all heads: query blocks with equal or similar lists are grouped once per plan (`prepare`), the keys of a
group are gathered once per call, and the group is one dense problem, masked only where a pair inside it is forbidden.
Lists per head: `routed`. Every query is in one group, so that nothing needs merging afterwards.

Memory beyond inputs and outputs: `CHUNK_BYTES` of gathered rows, `dense.LOGITS` logits off the CPU, one batch's mask
(at most `grouping.MAX_PAIRS` pairs), fp32 sums of dk and dv in the backward; and what `prepare` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dit_accel.kernels.block_sparse import dense, routed
from dit_accel.kernels.block_sparse.geometry import Geometry, Layout, query_layout, read_layouts
from dit_accel.kernels.block_sparse.prepare import PreparationCache
from dit_accel.kernels.block_sparse.rows import accumulate, gather, new_output, scatter, spread

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
    out, lse = new_output(q)
    lists = kv_indices, kv_counts, partial, tables
    for b, rows_q, rows_k, bias in _problems(q, k, lists, shape, layouts):
        part, sums = dense.forward(gather(q[b], rows_q), gather(k[b], rows_k), gather(v[b], rows_k), bias, scale)
        scatter(out[b], rows_q, part)
        scatter(lse[b], rows_q, sums if bias is None else sums.masked_fill_(_blind(bias), float("-inf")))
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
    # A row that sees nothing has weights exp(-inf - 0) = 0 instead of exp(-inf + inf).
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    if kv_indices.ndim == 4:
        return routed.backward(
            grad_out, grad_lse, q, k, v, out, lse, kv_indices, kv_counts, partial, tables, shape, layouts, scale
        )
    grad_q, _ = new_output(q)
    grad_k, grad_v = (spread(x, lse.dtype) for x in (k, v))
    lists = kv_indices, kv_counts, partial, tables
    for b, rows_q, rows_k, bias in _problems(q, k, lists, shape, layouts):
        dlse = None if grad_lse is None else gather(grad_lse[b], rows_q)
        dq, dk, dv = dense.backward(
            gather(grad_out[b], rows_q), dlse, gather(q[b], rows_q), gather(k[b], rows_k), gather(v[b], rows_k),
            gather(out[b], rows_q), gather(lse[b], rows_q), bias, scale,
        )  # fmt: skip
        scatter(grad_q[b], rows_q, dq)
        accumulate(grad_k[b], rows_k, dk)
        accumulate(grad_v[b], rows_k, dv)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _problems(
    q: torch.Tensor, k: torch.Tensor, lists: tuple, geometry: Geometry, layouts: list[Layout]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Every sample's dense problems: sample, query rows [G, nq], key rows [G, nk], bias [1, 1, nq, nk] or None."""
    batches = preparations.get(*lists, geometry, q.device)
    grid_q, grid_k = geometry.query_order.grid, geometry.key_order.grid
    places = {
        layout: (
            query_layout(geometry, layout).positions(grid_q.visual, grid_q.reference, grid_q.text).to(q.device),
            layout.positions(grid_k.visual, grid_k.reference, grid_k.text).to(q.device),
        )
        for layout in set(layouts)
    }
    row_bytes = q.shape[1] * q.shape[3] * q.element_size()
    for batch in batches:
        mask = batch.mask()
        groups = max(1, CHUNK_BYTES // (row_bytes * (2 * batch.q.shape[1] + 2 * batch.k.shape[1])))
        for b, layout in enumerate(layouts):
            place_q, place_k = places[layout]
            bias, keys = mask, batch.k
            if layout.text_len < geometry.text:
                valid = int((keys[0] < len(place_k) - geometry.text + layout.text_len).sum())
                keys, bias = keys[:, :valid], None if mask is None else mask[..., :valid]
                if not valid:
                    continue
            for rows_q, rows_k in zip(batch.q.split(groups), keys.split(groups), strict=True):
                yield b, place_q[rows_q], place_k[rows_k], bias


def _blind(bias: torch.Tensor) -> torch.Tensor:
    """Rows that see no key at all: bool [1, 1, nq]."""
    return bias.amax(-1) == float("-inf")
