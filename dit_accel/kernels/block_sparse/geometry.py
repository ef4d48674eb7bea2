"""How block lists address tokens: plain integers that travel through the custom ops, and what they mean.

A sequence holds up to three segments: visual tokens (a grid in raster order), conditioning tokens and text tokens. The
kernels number tokens *canonically* as ``[visual | conditioning | text]``; where each segment begins in memory is
said per sample by `Layout`, so that text before, behind or between needs no copy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of both sides of the attention.

    Args:
        grid: frames, rows, columns of the visual keys; the packed tables speak of these axes.
        query_grid: the same for the visual queries.
        block_q, block_k: tokens in a query block and in a key block.
        tile_q, tile_k: 3-D tile of a visual block, None for raster order.
        conditioning, text: conditioning and text keys, padding included.
        own_queries: the queries are a grid of visual tokens of their own, from row 0; else they are the keys' tokens.
        partial_blocks: list entries whose pairs the tables decide, if the caller knows: room is made for as many.
    """

    grid: Shape
    query_grid: Shape
    block_q: int
    block_k: int
    tile_q: Shape | None
    tile_k: Shape | None
    conditioning: int
    text: int
    own_queries: bool
    partial_blocks: int | None = None

    def pack(self) -> list[int]:
        """The integers in the order in which the custom ops carry them."""
        none = (0, 0, 0)
        partial_blocks = -1 if self.partial_blocks is None else self.partial_blocks
        return [
            *self.grid, *self.query_grid, self.block_q, self.block_k, *(self.tile_q or none), *(self.tile_k or none),
            self.conditioning, self.text, int(self.own_queries), partial_blocks,
        ]  # fmt: skip

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Geometry:
        """The inverse of `pack`."""
        v = [int(i) for i in ints]
        grid, query_grid, tile_q, tile_k = ((v[at], v[at + 1], v[at + 2]) for at in (0, 3, 8, 11))
        tiles = tile_q if any(tile_q) else None, tile_k if any(tile_k) else None
        return cls(grid, query_grid, v[6], v[7], *tiles, v[14], v[15], bool(v[16]), None if v[17] < 0 else v[17])

    @property
    def query_order(self) -> TokenOrder:
        """Query blocks over the canonical numbering of the queries."""
        text, conditioning = (0, 0) if self.own_queries else (self.text, self.conditioning)
        grid = TokenGrid(*self.query_grid, text=text, conditioning=conditioning)
        return TokenOrder(grid, self.block_q, self.tile_q)

    @property
    def key_order(self) -> TokenOrder:
        """Key blocks over the canonical numbering of the keys."""
        return TokenOrder(
            TokenGrid(*self.grid, text=self.text, conditioning=self.conditioning), self.block_k, self.tile_k
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one sample's segments begin, and how many of its text keys are valid."""

    visual_start: int
    conditioning_start: int
    text_start: int
    text_len: int

    def positions(self, visual: int, conditioning: int, text: int) -> torch.Tensor:
        """Row in memory of every canonical token: int64 [visual + conditioning + text]."""
        starts = (self.visual_start, visual), (self.conditioning_start, conditioning), (self.text_start, text)
        return torch.cat([torch.arange(start, start + count) for start, count in starts])


def read_layouts(
    geometry: Geometry,
    batch: int,
    tokens: int,
    visual_start: torch.Tensor | None,
    conditioning_start: torch.Tensor | None,
    text_start: torch.Tensor | None,
    text_len: torch.Tensor | None,
) -> list[Layout]:
    """Key layouts of all samples, from the int32 [batch] tensors; None means ``[visual | conditioning | text]``.

    Raises:
        DitAccelError: a segment leaves the sequence of `tokens` keys, two segments overlap, or a text length is
            negative or above the text's size.
    """
    visual = geometry.key_order.grid.visual
    usual = (0, visual, visual + geometry.conditioning, geometry.text)
    given = (visual_start, conditioning_start, text_start, text_len)
    columns = [[u] * batch if t is None else t.tolist() for u, t in zip(usual, given, strict=True)]
    layouts = [Layout(*row) for row in zip(*columns, strict=True)]
    for layout in set(layouts):
        spans = [
            (layout.visual_start, visual),
            (layout.conditioning_start, geometry.conditioning),
            (layout.text_start, geometry.text),
        ]
        spans = sorted((start, start + count) for start, count in spans if count)
        if spans[0][0] < 0 or spans[-1][1] > tokens or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise DitAccelError(
                f"The segments of a sample must not overlap and must lie within its {tokens} keys; got {layout} for "
                f"{visual} visual, {geometry.conditioning} conditioning and {geometry.text} text tokens."
            )
        if not 0 <= layout.text_len <= geometry.text:
            raise DitAccelError(f"text_len must be between 0 and text={geometry.text}, got {layout.text_len}.")
    return layouts


def query_layout(geometry: Geometry, layout: Layout) -> Layout:
    """Where a sample's queries lie: as its keys do, or from row 0 if they are a grid of their own."""
    return Layout(0, 0, 0, 0) if geometry.own_queries else layout
