"""Lists per head, which differ from call to call: query blocks with equally long lists are computed in batches.

Nothing is prepared or kept. Queries, keys and values are laid out once in block order, so that a listed block is one
contiguous piece of memory; padding slots and text that is not valid are masked, and never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dit_accel.kernels.block_sparse import dense
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Placement, query_placement
from dit_accel.kernels.block_sparse.predicate import Predicate
from dit_accel.kernels.block_sparse.prepare import check_lists
from dit_accel.kernels.block_sparse.rows import add_rows, empty_output, parts, zeros_spread

# Bytes of gathered keys and values at a time: they stay in a last-level cache.
CHUNK_BYTES = 8 << 20


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lists: BlockLists, geometry: Geometry, places: list[Placement], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `portable.forward`, with lists [B, H, q_blocks, width]."""
    out, lse = empty_output(q)
    used = check_lists(lists, geometry.key_order.blocks)
    for b, place in enumerate(places):
        side_q, side_k = _sides(geometry, place, q.device)
        queries, keys, values = side_q.blocks(q[b]), side_k.blocks(k[b]), side_k.blocks(v[b])
        outs, lses = torch.zeros_like(queries), lse.new_full(queries.shape[:2], float("-inf"))
        for rows, listed, bias in _problems(_of_sample(lists, b), used[b], geometry, side_q, side_k, queries):
            gq, gk, gv = queries[rows], _pick(keys, listed), _pick(values, listed)
            part, sums = torch.empty_like(gq), lses.new_empty(gq.shape[:2])
            for (at,) in parts(gq, 1):
                part[at], sums[at] = dense.forward(gq[at], gk[at], gv[at], None if bias is None else bias[at], scale)
            outs[rows], lses[rows] = part, sums
        side_q.write(out[b], outs)
        side_q.write(lse[b], lses)
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lists: BlockLists, geometry: Geometry, places: list[Placement], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `portable.backward`, with lists [B, H, q_blocks, width]."""
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    used = check_lists(lists, geometry.key_order.blocks)
    for b, place in enumerate(places):
        side_q, side_k = _sides(geometry, place, q.device)
        queries, keys, values = side_q.blocks(q[b]), side_k.blocks(k[b]), side_k.blocks(v[b])
        upstream = side_q.blocks(grad_out[b])
        delta = (upstream * side_q.blocks(out[b])).sum(-1)
        if grad_lse is not None:
            delta -= side_q.blocks(grad_lse[b])
        sums = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for rows, listed, bias in _problems(_of_sample(lists, b), used[b], geometry, side_q, side_k, queries):
            go, gd, gq = upstream[rows], delta[rows], queries[rows]
            gk, gv = _pick(keys, listed), _pick(values, listed)
            results = torch.empty_like(gq), torch.empty_like(gk), torch.empty_like(gv)
            for (at,) in parts(gq, 1):
                mask = None if bias is None else bias[at]
                gradients = dense.backward(go[at], gd[at], gq[at], gk[at], gv[at], mask, scale)
                for result, gradient in zip(results, gradients, strict=True):
                    result[at] = gradient
            sums[0][rows] = results[0]
            for total, result in zip(sums[1:], results[1:], strict=True):
                add_rows(total[None], listed, result.view(1, *listed.shape, *total.shape[1:]))
        for side, grad, total in zip((side_q, side_k, side_k), grads, sums, strict=True):
            side.write(grad[b], total)
    return grads


@dataclasses.dataclass
class _Side:
    """Queries or keys of one sample in block order."""

    block: int
    index: torch.Tensor  # canonical token of every slot, -1 for padding and for text that is not valid
    rows: torch.Tensor  # row in memory of every slot, 0 for those
    valid: torch.Tensor  # bool, slots that hold a token
    whole: bool  # all slots do

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """x [H, N, D] or [H, N] in high precision as [H * blocks, block, ...], zero where no token is."""
        slots = x.to(dense.high_precision(x.dtype)).index_select(1, self.rows)
        if not self.whole:
            slots.masked_fill_(~self.valid if x.ndim == 2 else ~self.valid[:, None], 0)
        return slots.view(-1, self.block, *x.shape[2:])

    def write(self, x: torch.Tensor, blocks: torch.Tensor) -> None:
        """The inverse of `blocks`: write the tokens' rows into x."""
        slots = blocks.reshape(x.shape[0], -1, *x.shape[2:]).to(x.dtype)
        if self.whole:
            x.index_copy_(1, self.rows, slots)
        else:
            x.index_copy_(1, self.rows[self.valid], slots[:, self.valid])


def _sides(geometry: Geometry, place: Placement, device: torch.device) -> tuple[_Side, _Side]:
    sides = []
    for order, where, text in (
        (geometry.query_order, query_placement(geometry, place), geometry.query_order.grid.text),
        (geometry.key_order, place, place.text_len),
    ):
        grid, index = order.grid, order.index()
        valid = (index >= 0) & (index < grid.visual + grid.conditioning + text)
        index = index.where(valid, -1)
        rows = where.positions(grid.visual, grid.conditioning, grid.text)[index.clamp(min=0)]
        rows = rows.where(valid, 0)
        sides.append(_Side(order.block, index.to(device), rows.to(device), valid.to(device), bool(valid.all())))
    return sides[0], sides[1]


def _of_sample(lists: BlockLists, b: int) -> BlockLists:
    partial = None if lists.partial is None else lists.partial[b]
    return BlockLists(lists.indices[b], lists.counts[b], partial, lists.tables)


def _problems(
    lists: BlockLists, used: torch.Tensor, geometry: Geometry, side_q: _Side, side_k: _Side, queries: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Dense problems of a sample: query blocks [R], key blocks [R, count], bias [R, block_q, count * block_k] or None.

    Blocks of queries and keys are numbered over all heads.
    """
    kv_indices, counts, partial, tables, _ = lists
    heads, _, width = kv_indices.shape
    shift = torch.arange(heads, device=kv_indices.device)[:, None, None] * geometry.key_order.blocks
    listed, counts = (kv_indices.long() + shift).reshape(-1, width), counts.flatten()
    ragged = ~side_k.valid.view(-1, geometry.block_k).all(1)
    masked = (ragged[kv_indices.long() * used] & used).any(-1).flatten()
    check = None
    if tables is not None:
        check = (used if partial is None else used & partial).reshape(-1, width)
        masked |= check.any(-1)
        predicate = Predicate(tables, geometry.query_grid, geometry.grid)
    for count in counts.unique().tolist():
        if not count:
            continue
        step = max(1, CHUNK_BYTES // (2 * count * geometry.block_k * queries.shape[2] * queries.element_size()))
        for with_mask in (False, True):
            for rows in ((counts == count) & (masked == with_mask)).nonzero().squeeze(1).split(step):
                if not len(rows):
                    continue
                keys, bias = listed[rows, :count], None
                if with_mask:
                    allowed = side_k.valid.view(-1, geometry.block_k)[keys % geometry.key_order.blocks].flatten(1)[
                        :, None
                    ]
                    if check is not None:
                        pairs = _pairs(predicate, geometry, side_q, side_k, rows, keys)
                        allowed = allowed & (
                            pairs | ~check[rows, :count].repeat_interleave(geometry.block_k, 1)[:, None]
                        )
                    zeros = torch.zeros(allowed.shape, dtype=torch.float32, device=allowed.device)
                    bias = zeros.masked_fill_(~allowed, float("-inf")).expand(-1, geometry.block_q, -1)
                yield rows, keys, bias


def _pairs(
    predicate: Predicate, geometry: Geometry, side_q: _Side, side_k: _Side, rows: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """What the tables say of each pair, true where one of the two is not visual: bool [R, block_q, count * block_k]."""
    q = side_q.index.view(-1, geometry.block_q)[rows % geometry.query_order.blocks]
    k = side_k.index.view(-1, geometry.block_k)[keys % geometry.key_order.blocks].flatten(1)
    visual_q = (q >= 0) & (q < geometry.query_order.grid.visual)
    visual_k = (k >= 0) & (k < geometry.key_order.grid.visual)
    allowed = predicate.allowed(q.where(visual_q, 0), k.where(visual_k, 0))
    return allowed | ~visual_q[:, :, None] | ~visual_k[:, None]


def _pick(blocks: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Listed blocks [R, count] of blocks [n, block, D] as [R, count * block, D]."""
    return blocks.index_select(0, listed.flatten()).view(len(listed), -1, blocks.shape[2])
