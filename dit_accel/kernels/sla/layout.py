"""Visual tokens to blocks and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid


def visual_order(grid: Sequence[int], block: int, tile: Sequence[int] | None) -> TokenOrder:
    """The order of the visual tokens alone: (frames, rows, columns) in runs or tiles of `block` tokens."""
    frames, rows, columns = grid
    return TokenOrder(TokenGrid(frames, rows, columns), block, None if tile is None else (tile[0], tile[1], tile[2]))


def count_blocks(grid: Sequence[int], block: int, tile: Sequence[int] | None) -> int:
    """`visual_order(...).visual_blocks` for sizes that are symbols too, as tracing has them."""
    sizes, pieces = (grid, tile) if tile is not None else ([math.prod(grid)], [block])
    return math.prod((size + piece - 1) // piece for size, piece in zip(sizes, pieces, strict=True))


def to_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., visual, D] in raster order to [..., blocks, block, D]; padding slots are 0."""
    if order.tile is not None:
        tokens, _ = _permutation(order, x.device)
        # Padding slots read the added row of zeros.
        x = F.pad(x, (0, 0, 0, 1)).index_select(-2, tokens)
    elif padding := order.visual_blocks * order.block - order.grid.visual:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (order.visual_blocks, order.block))


def from_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., blocks, block, D] to [..., visual, D] in raster order; padding slots are dropped."""
    x = x.flatten(-3, -2)
    if order.tile is None:
        return x[..., : order.grid.visual, :]
    _, slots = _permutation(order, x.device)
    return x.index_select(-2, slots)


@functools.lru_cache(maxsize=16)
def _permutation(order: TokenOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of every slot, `visual` for padding, and the slot of every token: int64."""
    tokens = order.index()
    slots = torch.empty(order.grid.visual, dtype=torch.int64)
    filled = (tokens >= 0).nonzero().squeeze(1)
    slots[tokens[filled]] = filled
    tokens = torch.where(tokens < 0, order.grid.visual, tokens)
    return tokens.to(device), slots.to(device)
