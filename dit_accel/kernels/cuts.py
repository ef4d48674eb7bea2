"""How visual tokens are cut into blocks of queries and of keys, and tensors in blocks."""

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
    """How visual tokens are cut into blocks. Custom ops carry it as seven integers, which are symbols when traced.

    grid: frames, rows and columns of the visual tokens.
    block: tokens in a block.
    tile: (t, h, w) of blocks that are 3-D tiles; None for runs in raster order.
    """

    grid: Shape
    block: int
    tile: Shape | None = None

    @classmethod
    def of(cls, order: TokenOrder) -> Cut:
        return cls(order.grid.shape, order.block, order.tile)

    def pack(self) -> list[int]:
        """The integers, in the order of the custom ops' arguments."""
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
        """``order.visual_blocks``; also works for symbols."""
        if self.tile is None:
            return (math.prod(self.grid) + self.block - 1) // self.block
        return math.prod((size + piece - 1) // piece for size, piece in zip(self.grid, self.tile, strict=True))


class Cuts(NamedTuple):
    """How visual tokens are cut into blocks of queries and into blocks of keys; both of one grid."""

    queries: Cut
    keys: Cut

    @classmethod
    def of(cls, query_order: TokenOrder, key_order: TokenOrder) -> Cuts:
        return cls(Cut.of(query_order), Cut.of(key_order))

    def pack(self) -> list[int]:
        """The integers of both, in the order of the custom ops' arguments."""
        return [*self.queries.pack(), *self.keys.pack()]

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Cuts:
        """The inverse of `pack`."""
        half = len(ints) // 2
        return cls(Cut.unpack(ints[:half]), Cut.unpack(ints[half:]))


def visual_of(x: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The visual tokens of [B, H, N, D]: a view, or x itself if all tokens are visual."""
    # autograd copies the gradient of a slice into zeros, even if the slice is the whole tensor
    return x if grid.visual == grid.tokens else x[:, :, grid.visual_rows]


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
    """[..., blocks, block, D] to [..., visual, D] in raster order, without padding slots."""
    x = x.flatten(-3, -2)
    if order.tile is None:
        return x[..., : order.grid.visual, :]
    _, slots = _permutation(order, x.device)
    return x.index_select(-2, slots)


@functools.lru_cache(maxsize=16)
def _permutation(order: TokenOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of every slot (`visual` for padding) and the slot of every token: int64."""
    tokens = order.index()
    slots = torch.empty(order.grid.visual, dtype=torch.int64)
    filled = (tokens >= 0).nonzero().squeeze(1)
    slots[tokens[filled]] = filled
    tokens = torch.where(tokens < 0, order.grid.visual, tokens)
    return tokens.to(device), slots.to(device)


def block_means(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean of every block's tokens: [B, H, visual, D] to [B, H, blocks, D], fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if order.tile is not None:
        held = to_blocks(x.new_ones(order.grid.visual, 1, dtype=wide), order).sum(-2)
        return to_blocks(x, order).sum(-2, dtype=wide) / held
    whole = order.grid.visual // order.block
    runs = x[..., : whole * order.block, :].unflatten(-2, (whole, order.block)) if whole else x[..., :0, None, :]
    means = runs.mean(-2, dtype=wide)
    tail = x[..., whole * order.block :, :]
    return torch.cat([means, tail.mean(-2, keepdim=True, dtype=wide)], dim=-2) if tail.shape[-2] else means
