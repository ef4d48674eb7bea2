"""Rows in memory of the slots of blocks, for libraries that cut sequences into runs of rows.

Queries, keys and values are gathered in the order of slots (`order.TokenOrder.index`), and results are put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_accel.kernels.block_sparse.geometry import Geometry, Segments
from dit_accel.order import TokenOrder


def query_rows(geometry: Geometry, segments: Segments, q: torch.Tensor, *, whole: bool = False) -> torch.Tensor | None:
    """Row in memory of every slot of the queries: int64 [B, slots], any row for padding; None if rows are slots.

    With `whole` the last block is padded too: None only if every slot is a row.
    """
    order, usual = geometry.query_order, geometry.usual
    if geometry.own_queries:
        segments, usual = Segments(), (0, 0, 0, 0)
    if segments.visual_start is None and q.shape[2] == order.grid.tokens and _in_rows(order, usual, whole):
        return None
    return _rows(order, usual, segments, q)


def key_rows(
    geometry: Geometry, segments: Segments, k: torch.Tensor, *, whole: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows as `query_rows`, a valid token's for slots that are no key; and which slots are keys: bool [B, slots]."""
    order, text_len = geometry.key_order, segments.text_len
    if segments.visual_start is None and text_len is None and _in_rows(order, geometry.usual, whole):
        return None, None
    rows, index, grid = _rows(order, geometry.usual, segments, k), order.index(k.device), order.grid
    valid = (index >= 0).expand(len(k), -1)
    if text_len is not None:
        valid = valid & (index < grid.visual + grid.conditioning + text_len[:, None])
    # What is no key may hold anything, NaN too: it is not read.
    return torch.where(valid, rows, rows[:, :1]), valid


def _in_rows(order: TokenOrder, usual: Sequence[int], whole: bool) -> bool:
    """Whether slots are rows in memory where segments begin as usual: the visual one first, padding last or nowhere."""
    grid, block = order.grid, order.block
    ends = [count for count in (grid.visual, grid.conditioning, grid.text) if count][: None if whole else -1]
    return order.tile is None and usual[0] == 0 and all(count % block == 0 for count in ends)


def _rows(order: TokenOrder, usual: Sequence[int], segments: Segments, x: torch.Tensor) -> torch.Tensor:
    """Rows [B, slots] of x [B, H, N, D], whose segments begin as usual if not told; for padding, the first visual."""
    grid, index = order.grid, order.index(x.device)
    starts = [
        x.new_full((len(x), 1), first, dtype=torch.int64) if start is None else start[:, None].long()
        for first, start in zip(usual[:3], segments[:3], strict=True)
    ]
    rows = starts[0] + index.clamp(min=0)
    for first, start in zip((grid.visual, grid.visual + grid.conditioning), starts[1:], strict=True):
        rows = torch.where(index >= first, start + index - first, rows)
    return rows


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows [B, slots] of x [B, H, N, ...]: [B, H, slots, ...]; x itself for None."""
    if rows is None:
        return x
    return torch.stack([sample.index_select(1, places) for sample, places in zip(x, rows, strict=True)])


def put(
    x: torch.Tensor, rows: torch.Tensor | None, valid: torch.Tensor | None, tokens: int, empty: float = 0.0
) -> torch.Tensor:
    """The inverse of `take`: [B, H, tokens, ...]. Rows that no slot names are `empty`.

    Args:
        x: [B, H, slots, ...].
        rows: [B, slots].
        valid: bool [slots] or [B, slots], slots that are tokens; not read without rows.
    """
    if rows is None or valid is None:
        return x
    targets = torch.where(valid, rows, tokens)  # a spare row takes the others; no wait for the device
    room = x.new_full((*x.shape[:2], tokens + 1, *x.shape[3:]), empty)
    filled = [target.index_copy(1, places, sample) for target, places, sample in zip(room, targets, x, strict=True)]
    return torch.stack(filled)[:, :, :tokens]
