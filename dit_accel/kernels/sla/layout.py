"""Visual tokens to blocks and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid


class Cut(NamedTuple):
    """How visual tokens are cut into blocks. Custom ops carry it as seven integers, which may be symbols in tracing.

    grid: frames, rows and columns of the visual tokens.
    block: tokens a block holds.
    tile: (t, h, w) for blocks that are 3-D tiles, None for runs in raster order.
    """

    grid: Shape
    block: int
    tile: Shape | None = None

    @classmethod
    def of(cls, order: TokenOrder) -> Cut:
        """How an order cuts its visual tokens."""
        return cls(order.grid.shape, order.block, order.tile)

    def pack(self) -> list[int]:
        """The integers in the order in which the custom ops carry them."""
        return [*self.grid, self.block, *(self.tile or (0, 0, 0))]

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Cut:
        """The inverse of `pack`."""
        frames, rows, columns, block, *tile = ints
        return cls((frames, rows, columns), block, (tile[0], tile[1], tile[2]) if tile[1] else None)

    @property
    def order(self) -> TokenOrder:
        """The order of the visual tokens alone."""
        return TokenOrder(TokenGrid(*self.grid), self.block, self.tile)

    @property
    def blocks(self) -> int:
        """``order.visual_blocks``, for symbols too."""
        if self.tile is None:
            return (math.prod(self.grid) + self.block - 1) // self.block
        return math.prod((size + piece - 1) // piece for size, piece in zip(self.grid, self.tile, strict=True))


class Segments(NamedTuple):
    """Where the tokens of each kind begin in a sequence, and how many conditioning and text tokens there are."""

    visual_start: int
    conditioning_start: int
    text_start: int
    conditioning: int
    text: int

    @classmethod
    def of(cls, grid: TokenGrid) -> Segments:
        """Those of a grid."""
        return cls(grid.visual_start, grid.conditioning_start, grid.text_start, grid.conditioning, grid.text)


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
