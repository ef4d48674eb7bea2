"""Token orders: the blocks of one side of the attention, queries or keys."""

from __future__ import annotations

import dataclasses
import math

import torch

from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Blocks of `block` tokens over a sequence: visual blocks first, then conditioning blocks, then text blocks.

    Visual blocks are runs of `block` tokens in raster order, or 3-D tiles of `tile` tokens. Tiles are numbered
    row-major over the grid of tiles, slots row-major inside a tile. Tiles at the far borders have padding slots.
    Conditioning and text tokens are cut into runs. Each segment is padded to whole blocks.

    Args:
        grid: the sequence.
        block: tokens a block holds.
        tile: tile size (frames, rows, columns) with ``t * h * w == block``; None for raster order.

    Raises:
        DitAccelError: `block` is less than one, or `tile` does not multiply to `block`.
    """

    grid: TokenGrid
    block: int
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise DitAccelError(f"A block holds at least one token, got block={self.block}.")
        if self.tile is not None and (len(self.tile) != 3 or min(self.tile) < 1 or math.prod(self.tile) != self.block):
            raise DitAccelError(
                f"A tile needs three sizes >= 1 whose product is the block of {self.block} tokens, got {self.tile}."
            )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Number of tiles along each axis; (1, 1, visual_blocks) in raster order."""
        if self.tile is None:
            return 1, 1, self.visual_blocks
        frames, rows, columns = (math.ceil(n / size) for n, size in zip(self.grid.shape, self.tile, strict=True))
        return frames, rows, columns

    @property
    def visual_blocks(self) -> int:
        if self.tile is None:
            return math.ceil(self.grid.visual / self.block)
        return math.prod(self.tiles)

    @property
    def conditioning_blocks(self) -> int:
        return math.ceil(self.grid.conditioning / self.block)

    @property
    def text_blocks(self) -> int:
        return math.ceil(self.grid.text / self.block)

    @property
    def dense_blocks(self) -> int:
        """Conditioning and text blocks, which attend to everything and which everything attends to."""
        return self.conditioning_blocks + self.text_blocks

    @property
    def blocks(self) -> int:
        return self.visual_blocks + self.dense_blocks

    def halved(self, device: torch.device | None = None) -> tuple[TokenOrder, torch.Tensor]:
        """Blocks of half the size, each within one of these, and the block that each lies in: int64 [blocks].

        Tiles are cut along their first even side.
        """
        half = dataclasses.replace(self, block=self.block // 2, tile=None)
        if self.tile is None:
            parents = torch.arange(half.visual_blocks, device=device) // 2
        else:
            axis = next(axis for axis, size in enumerate(self.tile) if size % 2 == 0)
            t, h, w = (size // (2 if at == axis else 1) for at, size in enumerate(self.tile))
            half = dataclasses.replace(half, tile=(t, h, w))
            frames, rows, columns = (
                torch.arange(count, device=device) // (2 if at == axis else 1) for at, count in enumerate(half.tiles)
            )
            _, height, width = self.tiles
            parents = ((frames[:, None, None] * height + rows[:, None]) * width + columns).flatten()
        conditioning, text = (
            torch.arange(count, device=device) // 2 for count in (half.conditioning_blocks, half.text_blocks)
        )
        before_text = self.visual_blocks + self.conditioning_blocks
        return half, torch.cat([parents, self.visual_blocks + conditioning, before_text + text])

    def cut(self, most: int, device: torch.device | None = None) -> tuple[TokenOrder, torch.Tensor]:
        """Blocks halved until none has more than `most` tokens, and the block that each lies in: int64 [blocks]."""
        order, parents = self, torch.arange(self.blocks, device=device)
        while order.block > most:
            order, halves = order.halved(device)
            parents = parents[halves]
        return order, parents

    def index(self, device: torch.device | None = None) -> torch.Tensor:
        """The token, in model order, of every slot: int64 [blocks * block], -1 for padding slots."""
        grid = self.grid
        others = (grid.conditioning_start, grid.conditioning), (grid.text_start, grid.text)
        return torch.cat([self._visual_index(device), *(self._run(*other, device) for other in others)])

    def block_of_token(self) -> torch.Tensor:
        """The block of every token, in model order: int64 [tokens]."""
        index = self.index()
        slots = (index >= 0).nonzero().squeeze(1)
        return torch.empty_like(slots).index_copy_(0, index[slots], slots // self.block)

    def block_of_visual(self, device: torch.device | None = None) -> torch.Tensor:
        """The block of every visual token, in raster order: int64 [visual]. Does not wait for the device."""
        if self.tile is None:
            return torch.arange(self.grid.visual, device=device) // self.block
        frames, rows, columns = (
            torch.arange(length, device=device) // size for length, size in zip(self.grid.shape, self.tile, strict=True)
        )
        _, height, width = self.tiles
        return ((frames[:, None, None] * height + rows[:, None]) * width + columns).flatten()

    def _visual_index(self, device: torch.device | None) -> torch.Tensor:
        start = self.grid.visual_start
        if self.tile is None:
            return self._run(start, self.grid.visual, device)
        (_, height, width), (tile_t, tile_h, tile_w), (n_t, n_h, n_w) = self.grid.shape, self.tile, self.tiles
        t = torch.arange(n_t * tile_t, device=device).reshape(n_t, 1, 1, tile_t, 1, 1)
        h = torch.arange(n_h * tile_h, device=device).reshape(1, n_h, 1, 1, tile_h, 1)
        w = torch.arange(n_w * tile_w, device=device).reshape(1, 1, n_w, 1, 1, tile_w)
        inside = (t < self.grid.frames) & (h < height) & (w < width)
        return torch.where(inside, start + (t * height + h) * width + w, -1).flatten()

    def _run(self, start: int, count: int, device: torch.device | None) -> torch.Tensor:
        slots = torch.arange(math.ceil(count / self.block) * self.block, device=device)
        return torch.where(slots < count, start + slots, -1)


def valid_tokens(order: TokenOrder, device: torch.device | None = None) -> torch.Tensor:
    """Tokens, not padding slots, in each visual block: int32 [visual_blocks]."""
    if order.tile is None:
        blocks = torch.arange(order.visual_blocks, dtype=torch.int32, device=device)
        return (order.grid.visual - blocks * order.block).clamp_(max=order.block)
    sizes = [
        (length - torch.arange(count, dtype=torch.int32, device=device) * size).clamp_(max=size)
        for length, count, size in zip(order.grid.shape, order.tiles, order.tile, strict=True)
    ]
    return (sizes[0][:, None, None] * sizes[1][:, None] * sizes[2]).flatten()
