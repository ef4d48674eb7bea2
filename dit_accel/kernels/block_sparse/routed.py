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
from dit_accel.kernels.block_sparse.prepare import as_bias, check_lists
from dit_accel.kernels.block_sparse.rows import Rows, empty_output, zeros_spread


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
        for rows, listed, bias, blind in _problems(_of_sample(lists, b), used[b], geometry, side_q, side_k, queries):
            gq, gk, gv = queries[rows], _pick(keys, listed), _pick(values, listed)
            part, sums = dense.forward(gq[:, None], gk, gv, bias, blind, scale)
            outs[rows], lses[rows] = part[:, 0], sums[:, 0]
        side_q.write(out[b], outs)
        side_q.write(lse[b], lses)
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    lists: BlockLists, geometry: Geometry, places: list[Placement], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `portable.backward`, with lists [B, H, q_blocks, width]."""
    grads = zeros_spread(q), zeros_spread(k), zeros_spread(v)
    used = check_lists(lists, geometry.key_order.blocks)
    for b, place in enumerate(places):
        side_q, side_k = _sides(geometry, place, q.device)
        upstream, queries, outs, lses = (side_q.blocks(x[b]) for x in (grad_out, q, out, lse))
        upstream_lse = None if grad_lse is None else side_q.blocks(grad_lse[b])
        keys, values = side_k.blocks(k[b]), side_k.blocks(v[b])
        sums = [torch.zeros_like(x, dtype=dense.accumulation(q.dtype)) for x in (queries, keys, values)]
        for rows, listed, bias, _ in _problems(_of_sample(lists, b), used[b], geometry, side_q, side_k, queries):
            dlse = None if upstream_lse is None else upstream_lse[rows][:, None]
            dq, dk, dv = dense.backward(
                upstream[rows][:, None], dlse, queries[rows][:, None], _pick(keys, listed), _pick(values, listed),
                outs[rows][:, None], lses[rows][:, None], bias, scale,
            )  # fmt: skip
            sums[0][rows] = dq[:, 0].to(sums[0].dtype)
            into = Rows(listed.flatten()[None])
            for total, part in zip(sums[1:], (dk, dv), strict=True):
                into.add(total[None], part.reshape(1, 1, -1, *total.shape[1:]))
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
    run: slice | None  # all slots do, and the rows are consecutive

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """x [H, N, D] or [H, N] as [H * blocks, block, ...], zero where no token is."""
        if self.run is not None:
            return x[:, self.run].contiguous().view(-1, self.block, *x.shape[2:])
        slots = x.contiguous().index_select(1, self.rows)
        if not self.whole:
            slots.masked_fill_(~self.valid if x.ndim == 2 else ~self.valid[:, None], 0)
        return slots.view(-1, self.block, *x.shape[2:])

    def write(self, x: torch.Tensor, blocks: torch.Tensor) -> None:
        """The inverse of `blocks`: write the tokens' rows into x."""
        slots = blocks.view(x.shape[0], -1, *x.shape[2:])
        if self.run is not None:
            x[:, self.run] = slots
            return
        slots = slots.to(x.dtype)
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
        whole, first = bool(valid.all()), int(rows[0])
        straight = whole and torch.equal(rows, torch.arange(first, first + len(rows)))
        run = slice(first, first + len(rows)) if straight else None
        sides.append(_Side(order.block, index.to(device), rows.to(device), valid.to(device), whole, run))
    return sides[0], sides[1]


def _of_sample(lists: BlockLists, b: int) -> BlockLists:
    partial = None if lists.partial is None else lists.partial[b]
    return BlockLists(lists.indices[b], lists.counts[b], partial, lists.tables)


def _problems(
    lists: BlockLists, used: torch.Tensor, geometry: Geometry, side_q: _Side, side_k: _Side, queries: torch.Tensor
) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """Dense problems of a sample: R query blocks, key blocks [R, count], bias and blind rows as `dense.forward` wants.

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
        head_bytes = (geometry.block_q + 2 * count * geometry.block_k) * queries.shape[2] * queries.element_size()
        step = max(1, 4 * dense.bytes_per_call(queries.device) // head_bytes)
        for with_mask in (False, True):
            for rows in ((counts == count) & (masked == with_mask)).nonzero().squeeze(1).split(step):
                if not len(rows):
                    continue
                keys, bias, blind = listed[rows, :count], None, None
                if with_mask:
                    allowed = side_k.valid.view(-1, geometry.block_k)[keys % geometry.key_order.blocks].flatten(1)[
                        :, None
                    ]
                    if check is not None:
                        pairs = _pairs(predicate, geometry, side_q, side_k, rows, keys)
                        allowed = allowed & (
                            pairs | ~check[rows, :count].repeat_interleave(geometry.block_k, 1)[:, None]
                        )
                    bias = as_bias(allowed).expand(-1, geometry.block_q, -1)[:, None]
                    blind = ~allowed.any(-1)[:, None]
                first, last = int(rows[0]), int(rows[-1])
                yield slice(first, last + 1) if last - first == len(rows) - 1 else rows, keys, bias, blind


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
    """Listed blocks [R, count] of blocks [n, block, D] as [R, 1, count * block, D]."""
    return blocks.index_select(0, listed.flatten()).view(len(listed), 1, -1, blocks.shape[2])
