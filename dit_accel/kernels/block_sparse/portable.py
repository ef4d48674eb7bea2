"""Block-sparse attention in PyTorch alone, on any device: listed blocks are gathered and computed, the rest skipped.

Lists shared by all heads: query blocks with equal or similar lists are grouped once per plan (`prepare`). The groups of
one size are batched into dense problems, masked only where a pair inside is forbidden. A problem whose rows are
consecutive in memory is a view; others are gathered. Lists per head: `routed`.

Memory beyond inputs and outputs: a copy of one sample's inputs where they are not [B, N, H, D] in memory, the sample's
gradients in fp32, `GROUP_BYTES` of gathered rows (at least one head of one group), one batch's mask of at most
`grouping.MAX_PAIRS` pairs, and what `prepare` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_accel.kernels.block_sparse import dense, routed
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    Geometry,
    Placement,
    Segments,
    read_placements,
)
from dit_accel.kernels.block_sparse.prepare import Batch, PreparationCache
from dit_accel.kernels.block_sparse.rows import Rows, empty_output, rows_first, zeros_spread

# Bytes of queries, keys and values of one group, above which its heads are computed in turn.
GROUP_BYTES = 32 << 20

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
        queries, keys, values = (rows_first(x[b]) for x in (q, k, v))
        outs, lses = out[b], rows_first(lse[b])
        for heads, rows_q, rows_k, (bias, blind), merged in _problems(batches, geometry, place, q):
            inputs = rows_q.of(queries[heads]), rows_k.of(keys[heads]), rows_k.of(values[heads])
            part, sums = dense.forward(*inputs, bias, blind, scale)
            if merged:
                part, sums = dense.merge(rows_q.of(outs[heads]), rows_q.of(lses[heads]), part, sums)
            rows_q.write(outs[heads], part)
            rows_q.write(lses[heads], sums)
        lse[b] = lses
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
        return routed.backward(grad_out, grad_lse, q, k, v, out, lse, lists, geometry, places, scale)
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    batches = preparations.get(lists, geometry, q.device)
    for b, place in enumerate(places):
        upstream, queries, keys, values, outs, lses = (rows_first(x[b]) for x in (grad_out, q, k, v, out, lse))
        upstream_lse = None if grad_lse is None else rows_first(grad_lse[b])
        sums = [torch.zeros_like(x[b], dtype=dense.accumulation(x.dtype)) for x in grads]
        for heads, rows_q, rows_k, (bias, _), _ in _problems(batches, geometry, place, q):
            parts = dense.backward(
                rows_q.of(upstream[heads]), None if upstream_lse is None else rows_q.of(upstream_lse[heads]),
                rows_q.of(queries[heads]), rows_k.of(keys[heads]), rows_k.of(values[heads]),
                rows_q.of(outs[heads]), rows_q.of(lses[heads]), bias, scale,
            )  # fmt: skip
            for rows, total, part in zip((rows_q, rows_k, rows_k), sums, parts, strict=True):
                rows.add(total[heads], part)
        for grad, total in zip(grads, sums, strict=True):
            grad[b] = total
    return grads


def _problems(
    batches: list[Batch], geometry: Geometry, place: Placement, q: torch.Tensor
) -> Iterator[tuple[slice, Rows, Rows, tuple[torch.Tensor | None, torch.Tensor | None], bool]]:
    """A sample's dense problems: heads, rows of queries and keys, bias and blind rows, and `Batch.merged`.

    A call holds as many groups as `dense.bytes_per_call` says, and fewer heads where one group is above `GROUP_BYTES`.
    """
    heads = q.shape[1]
    for batch in batches:
        found = batch.placed(geometry, place)
        if found is None:
            continue
        rows_q, rows_k, mask = found
        head_bytes = (rows_q.shape[1] + 2 * rows_k.shape[1]) * q.shape[3] * q.element_size()
        groups = max(1, dense.bytes_per_call(q.device) // (head_bytes * heads))
        some_heads = max(1, min(heads, GROUP_BYTES // head_bytes))
        for first in range(0, rows_q.shape[0], groups):
            chunk = slice(first, first + groups)
            for head in range(0, heads, some_heads):
                yield slice(head, head + some_heads), rows_q[chunk], rows_k[chunk], mask, batch.merged
