"""Block-sparse attention in PyTorch alone, on any device: listed blocks are gathered and computed, the rest skipped.

Lists shared by all heads: query blocks with equal or similar lists are grouped once per plan (`prepare`). Groups of one
size are batched into dense problems, masked only if they hold a forbidden pair. A problem whose rows are consecutive in
memory is a view; others are gathered.

Lists per head differ from call to call, so nothing of them is kept. Query blocks with equally long lists are computed
in batches. Queries, keys and values are copied once into block order, so a listed block is contiguous. Padding slots
and invalid text are masked and never read.

Memory beyond inputs and outputs:

* a copy of one sample's inputs that are not [B, N, H, D] in memory, the sample's gradients in fp32, and its output in
  fp32 if results are merged;
* `GROUP_BYTES` of gathered rows, or one head of one group;
* one batch's mask of at most `grouping.MAX_PAIRS` pairs, and the masks that `prepare` keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse import dense
from dit_accel.kernels.block_sparse.dense import Rows, empty_output, rows_first, zeros_spread
from dit_accel.kernels.block_sparse.geometry import (
    BlockLists,
    BlockSparseInputs,
    Geometry,
    Placement,
    Predicate,
    query_placement,
    read_placements,
)
from dit_accel.kernels.block_sparse.held import Held, HeldPlacement
from dit_accel.kernels.block_sparse.prepare import HELD_ENTRIES, Batch, PreparationCache, as_bias, check_lists

GROUP_BYTES = 32 << 20  # of queries, keys and values of a group; above, its heads are computed in turn

preparations, held_preparations = PreparationCache(), PreparationCache(HELD_ENTRIES)


def forward(call: BlockSparseInputs, held: Held | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D], in memory [B, Nq, H, D], and LSE [B, H, Nq].

    With `held` rows are the held tokens, lists have no head axis, and of `call.segments` `text_len` alone counts.
    """
    q, k, v, lists, _, geometry, scale = call
    if lists.indices.ndim == 4:
        return _forward_by_head(call, read_placements(geometry, len(q), k.shape[2], call.segments))
    out, lse = empty_output(q)
    places, batches = _prepared(call, held)
    # a row's results may be merged several times, and are rounded once
    kind = torch.promote_types(q.dtype, torch.float32) if any(batch.merged for batch in batches) else q.dtype
    for b, place in enumerate(places):
        queries, keys, values = (rows_first(x[b]) for x in (q, k, v))
        outs, lses = out[b].to(kind), rows_first(lse[b])
        for heads, rows_q, rows_k, (bias, blind), merged in _problems(batches, geometry, place, q):
            inputs = rows_q.of(queries[heads]), rows_k.of(keys[heads]), rows_k.of(values[heads])
            results = dense.forward(*inputs, bias, blind, scale)
            if merged:
                before = rows_q.of(outs[heads]), rows_q.of(lses[heads])
                dense.merge(*before, *results)
                if rows_q.consecutive:
                    continue
                results = before
            rows_q.write(outs[heads], results[0].to(kind))
            rows_q.write(lses[heads], results[1])
        lse[b] = lses
        if outs.dtype != out.dtype:
            out[b] = outs
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: BlockSparseInputs,
    held: Held | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory [B, N, H, D]; `out` and `lse` may come from more keys than the call has."""
    q, k, v, lists, _, geometry, scale = call
    if lists.indices.ndim == 4:
        by_head = read_placements(geometry, len(q), k.shape[2], call.segments)
        return _backward_by_head(grad_out, grad_lse, out, lse, call, by_head)
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    places, batches = _prepared(call, held)
    for b, place in enumerate(places):
        upstream, queries, keys, values, outs, lses = (rows_first(x[b]) for x in (grad_out, q, k, v, out, lse))
        upstream_lse = None if grad_lse is None else rows_first(grad_lse[b])
        sums = [torch.zeros_like(x[b], dtype=torch.promote_types(x.dtype, torch.float32)) for x in grads]
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


def _prepared(call: BlockSparseInputs, held: Held | None) -> tuple[Sequence[Placement | HeldPlacement], list[Batch]]:
    """Where each sample's rows lie, and the batches."""
    q, k, _, lists, segments, geometry, _ = call
    if held is None:
        return read_placements(geometry, len(q), k.shape[2], segments), preparations.get(lists, geometry, q.device)
    lens = [geometry.text] * len(q) if segments.text_len is None else segments.text_len.tolist()
    places = [HeldPlacement(held, length) for length in lens]
    return places, held_preparations.get(lists, geometry, q.device, held)


def _problems(
    batches: list[Batch], geometry: Geometry, place: Placement | HeldPlacement, q: Tensor
) -> Iterator[tuple[slice, Rows, Rows, tuple[Tensor | None, Tensor | None], bool]]:
    """A sample's dense problems: heads, rows of queries and keys, bias and blind rows, and `Batch.merged`.

    A problem holds groups of `dense.bytes_per_call` bytes, and fewer heads if one group is above `GROUP_BYTES`.
    """
    heads = q.shape[1]
    for batch in batches:
        placed = batch.placed(geometry, place)
        if placed is None:
            continue
        rows_q, rows_k, mask = placed
        head_bytes = (rows_q.shape[1] + 2 * rows_k.shape[1]) * q.shape[3] * q.element_size()
        views = rows_q.consecutive and rows_k.consecutive and q.element_size() > 2
        groups = max(1, (GROUP_BYTES if views else dense.bytes_per_call(q.device)) // (head_bytes * heads))
        some_heads = max(1, min(heads, GROUP_BYTES // head_bytes))
        for first in range(0, rows_q.shape[0], groups):
            chunk = slice(first, first + groups)
            for head in range(0, heads, some_heads):
                yield slice(head, head + some_heads), rows_q[chunk], rows_k[chunk], mask, batch.merged


def _forward_by_head(call: BlockSparseInputs, places: list[Placement]) -> tuple[Tensor, Tensor]:
    """As `forward`, with lists [B, H, q_blocks, width]."""
    q, k, v, lists, _, geometry, scale = call
    out, lse = empty_output(q)
    used = check_lists(lists, geometry.key_order.blocks)
    for b, place in enumerate(places):
        side_q, side_k = (side.to(q.device) for side in _sides(geometry, place))
        order, problems = _problems_by_head(_of_sample(lists, b), used[b], geometry, side_q, side_k, q)
        queries = side_q.blocks(q[b])[order]
        keys, values = (side_k.blocks(x[b]).flatten(0, 1).contiguous() for x in (k, v))
        outs, lses = torch.zeros_like(queries), lse.new_full(queries.shape[:2], float("-inf"))
        for rows, listed, bias, blind in problems:
            part, sums = dense.forward(
                queries[rows, None], _pick(keys, listed), _pick(values, listed), bias, blind, scale
            )
            outs[rows], lses[rows] = part[:, 0], sums[:, 0]
        side_q.write(out[b], order, outs)
        side_q.write(lse[b], order, lses)
    return out, lse


def _backward_by_head(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: BlockSparseInputs,
    places: list[Placement],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, with lists [B, H, q_blocks, width]."""
    q, k, v, lists, _, geometry, scale = call
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    used = check_lists(lists, geometry.key_order.blocks)
    for b, place in enumerate(places):
        side_q, side_k = (side.to(q.device) for side in _sides(geometry, place))
        order, problems = _problems_by_head(_of_sample(lists, b), used[b], geometry, side_q, side_k, q)
        upstream, queries, outs, lses = (side_q.blocks(x[b])[order] for x in (grad_out, q, out, lse))
        upstream_lse = None if grad_lse is None else side_q.blocks(grad_lse[b])[order]
        keys, values = (side_k.blocks(x[b]).flatten(0, 1).contiguous() for x in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        sums = [x.new_zeros(x.shape, dtype=wide) for x in (queries, keys, values)]
        for rows, listed, bias, _ in problems:
            dlse = None if upstream_lse is None else upstream_lse[rows, None]
            dq, *parts = dense.backward(
                upstream[rows, None], dlse, queries[rows, None], _pick(keys, listed), _pick(values, listed),
                outs[rows, None], lses[rows, None], bias, scale,
            )  # fmt: skip
            sums[0][rows] = dq[:, 0].to(sums[0].dtype)
            into = Rows(listed.flatten()[None])
            for total, part in zip(sums[1:], parts, strict=True):
                into.add(total[None], part.reshape(1, 1, -1, *total.shape[1:]))
        side_q.write(grads[0][b], order, sums[0])
        for grad, total in zip(grads[1:], sums[1:], strict=True):
            side_k.write(grad[b], ..., total.unflatten(0, (q.shape[1], -1)))
    return grads


@dataclasses.dataclass
class _Side:
    """Queries or keys of one sample in block order."""

    block: int
    index: Tensor  # canonical token of every slot; -1: padding or invalid text
    rows: Tensor  # row in memory of every slot; 0: padding or invalid text
    valid: Tensor  # bool, slots with a token
    whole: bool  # whether all slots have one
    run: slice | None  # the tokens' rows, if these are consecutive and no padding lies between them

    def to(self, device: torch.device) -> _Side:
        index, rows, valid = (x.to(device) for x in (self.index, self.rows, self.valid))
        return dataclasses.replace(self, index=index, rows=rows, valid=valid)

    def blocks(self, x: Tensor) -> Tensor:
        """x [H, N, ...] as [H, blocks, block, ...], zero without a token; a view if x has all rows in this order."""
        if self.run is not None:
            slots = x[:, self.run]
            if not self.whole:
                slots = F.pad(slots, (0, 0) * (x.ndim - 2) + (0, len(self.rows) - slots.shape[1]))
        else:
            slots = x.contiguous().index_select(1, self.rows)
            if not self.whole:
                slots.masked_fill_(~self.valid.view(-1, *[1] * (x.ndim - 2)), 0)
        return slots.unflatten(1, (-1, self.block))

    def write(self, x: Tensor, at: Any, blocks: Tensor) -> None:
        """The inverse of `blocks(x)[at]`, where `at` names every block once: write the tokens' rows into x."""
        if self.run is not None and self.whole:
            x[:, self.run].unflatten(1, (-1, self.block))[at] = blocks.to(x.dtype)
            return
        slots = x.new_empty(len(x), len(self.rows) // self.block, self.block, *x.shape[2:])
        slots[at] = blocks.to(x.dtype)
        slots = slots.flatten(1, 2)
        if self.run is not None:
            x[:, self.run] = slots[:, : self.run.stop - self.run.start]
        elif self.whole:
            x.index_copy_(1, self.rows, slots)
        else:
            x.index_copy_(1, self.rows[self.valid], slots[:, self.valid])


@functools.lru_cache(maxsize=16)
def _sides(geometry: Geometry, place: Placement) -> tuple[_Side, _Side]:
    """On a CPU: a device tensor that is kept may lie in the memory of a CUDA graph."""
    sides = []
    for order, where, text in (
        (geometry.query_order, query_placement(geometry, place), geometry.query_order.grid.text),
        (geometry.key_order, place, place.text_len),
    ):
        grid, index = order.grid, order.index()
        valid = (index >= 0) & (index < grid.visual + grid.conditioning + text)
        index = index.where(valid, -1)
        rows = where.positions(grid)[index.clamp(min=0)]
        rows = rows.where(valid, 0)
        whole, first, count = bool(valid.all()), int(rows[0]), int(valid.sum())
        straight = bool(valid[:count].all()) and torch.equal(rows[:count], torch.arange(first, first + count))
        run = slice(first, first + count) if straight else None
        sides.append(_Side(order.block, index, rows, valid, whole, run))
    return sides[0], sides[1]


def _of_sample(lists: BlockLists, b: int) -> BlockLists:
    partial = None if lists.partial is None else lists.partial[b]
    return BlockLists(lists.indices[b], lists.counts[b], partial, lists.tables)


def _problems_by_head(
    lists: BlockLists, used: Tensor, geometry: Geometry, side_q: _Side, side_k: _Side, q: Tensor
) -> tuple[tuple[Tensor, Tensor], Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]]:
    """A sample's query blocks in order of their lists' lengths, heads and blocks int64 [n], and problems in this order.

    A problem: places in the order, key blocks [R, count], bias and blind rows for `dense.forward`. Blocks are numbered
    over all heads.
    """
    kv_indices, counts, partial, tables, _ = lists
    heads, _, width = kv_indices.shape
    shift = torch.arange(heads, device=kv_indices.device)[:, None, None] * geometry.key_order.blocks
    listed, counts = (kv_indices.long() + shift).reshape(-1, width), counts.flatten()
    masked, check = torch.zeros_like(counts, dtype=torch.bool), None
    if not side_k.whole:
        ragged = ~side_k.valid.view(-1, geometry.block_k).all(1)
        masked = (ragged[kv_indices.long() * used] & used).any(-1).flatten()
    if tables is not None:
        check = (used if partial is None else used & partial).reshape(-1, width)
        masked |= check.any(-1)
    kinds, order = (2 * counts + masked).sort(stable=True)

    def problems() -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        predicate = None if tables is None else Predicate(tables, geometry.query_grid, geometry.grid)
        first = 0
        for kind, rows_of_kind in zip(*(x.tolist() for x in kinds.unique_consecutive(return_counts=True)), strict=True):
            last, count = first + rows_of_kind, kind // 2
            head_bytes = (geometry.block_q + 2 * count * geometry.block_k) * q.shape[3] * q.element_size()
            step = max(1, 2 * dense.bytes_per_call(q.device) // head_bytes)
            for start in range(first, last, step) if count else ():
                at = slice(start, min(start + step, last))
                rows = order[at]
                keys, bias, blind = listed[rows, :count], None, None
                if kind % 2:
                    valid = side_k.valid.view(-1, geometry.block_k)[keys % geometry.key_order.blocks]
                    allowed = valid.flatten(1)[:, None]
                    if check is not None and predicate is not None:
                        decided = check[rows, :count].repeat_interleave(geometry.block_k, 1)[:, None]
                        allowed = allowed & (_pairs(predicate, geometry, side_q, side_k, rows, keys) | ~decided)
                    bias = as_bias(allowed).expand(-1, geometry.block_q, -1)[:, None]
                    blind = ~allowed.any(-1)[:, None]
                yield at, keys, bias, blind
            first = last

    return (order // geometry.query_order.blocks, order % geometry.query_order.blocks), problems()


def _pairs(
    predicate: Predicate, geometry: Geometry, side_q: _Side, side_k: _Side, rows: Tensor, keys: Tensor
) -> Tensor:
    """The pairs that the tables allow, and pairs with another token: bool [R, block_q, count * block_k]."""
    q = side_q.index.view(-1, geometry.block_q)[rows % geometry.query_order.blocks]
    k = side_k.index.view(-1, geometry.block_k)[keys % geometry.key_order.blocks].flatten(1)
    visual_q = (q >= 0) & (q < geometry.query_order.grid.visual)
    visual_k = (k >= 0) & (k < geometry.key_order.grid.visual)
    allowed = predicate.allowed(q.where(visual_q, 0), k.where(visual_k, 0))
    return allowed | ~visual_q[:, :, None] | ~visual_k[:, None]


def _pick(blocks: Tensor, listed: Tensor) -> Tensor:
    """Listed blocks [R, count] of blocks [n, block, D] as [R, 1, count * block, D]."""
    return blocks.index_select(0, listed.flatten()).view(len(listed), 1, -1, blocks.shape[2])
