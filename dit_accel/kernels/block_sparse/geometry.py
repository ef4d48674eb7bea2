"""The records that make up a block-sparse call: block lists, the places of segments, and the sizes of both sides.

A sequence holds up to three segments: visual tokens (a grid in raster order), conditioning tokens and text tokens. The
kernels number tokens *canonically* as ``[visual | conditioning | text]``. `Segments` holds each sample's place of each
segment in memory, so no order needs a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

Shape = tuple[int, int, int]


class BlockLists(NamedTuple):
    """The key blocks that each query block visits.

    Attributes:
        indices: int32 [q_blocks, width], or [B, H, q_blocks, width] for lists per head: each key block at most once.
        counts: int32, shape of `indices` without the last dimension: entries of a row that are read.
        partial: bool, shape of `indices`: blocks in which `tables` decide pair by pair; other listed blocks are
            attended whole. None: all, if there are tables.
        tables: int32 [words], the packed predicate over visual pairs (`masks.Mask.pack`). Pairs with a text or
            conditioning token are always allowed. None: every listed block is attended whole.
        packed: these lists as `api.pack` made them for an implementation; outside the custom op also as that
            implementation's `opened` made them of this, a tuple.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    partial: torch.Tensor | None = None
    tables: torch.Tensor | None = None
    packed: torch.Tensor | Any = None

    @classmethod
    def full(cls, indices: torch.Tensor) -> BlockLists:
        """Lists in which every entry counts."""
        return cls(indices, indices.new_full(indices.shape[:-1], indices.shape[-1]))

    @property
    def used(self) -> torch.Tensor:
        """The entries that count: bool, shape of `indices`."""
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]

    def map(self, entries: torch.Tensor, blocks: int) -> torch.Tensor:
        """The blocks that marked entries list: bool [..., q_blocks, blocks]. Other entries fall into a spare column."""
        marked = torch.zeros(*self.counts.shape, blocks + 1, dtype=torch.bool, device=self.indices.device)
        return marked.scatter_(-1, torch.where(entries, self.indices.long(), blocks), True)[..., :blocks]

    def to(self, device: torch.device) -> BlockLists:
        return BlockLists(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


class Segments(NamedTuple):
    """Where each sample's segments start in memory, and how much of its text is valid.

    Rows in no segment are never read, and their output is 0.

    Attributes:
        visual_start, conditioning_start, text_start: int32 [B], first row of the segment. None for all three: where
            `Geometry.usual` says.
        text_len: int32 [B], valid text keys from `text_start` on; None: all. The other text rows are queries only.
    """

    visual_start: torch.Tensor | None = None
    conditioning_start: torch.Tensor | None = None
    text_start: torch.Tensor | None = None
    text_len: torch.Tensor | None = None

    @classmethod
    def of(cls, like: torch.Tensor, text_lens: torch.Tensor | None) -> Segments:
        """Segments of samples that all lie as `Geometry` says, with lengths of text on the device of `like`."""
        return cls(text_len=None if text_lens is None else text_lens.to(device=like.device, dtype=torch.int32))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of both sides of the attention; plain integers, which the custom ops carry.

    Args:
        grid: frames, rows, columns of the visual keys; the packed tables speak of these axes.
        query_grid: the same for the visual queries.
        block_q, block_k: tokens in a query block and in a key block.
        tile_q, tile_k: 3-D tile of a visual block, None for raster order.
        conditioning, text: conditioning and text keys, padding included.
        own_queries: the queries are visual tokens in a grid of their own, from row 0; else they are the keys' tokens.
        partial_blocks: upper bound of the listed blocks that the tables decide, if the caller knows one; some
            implementations allocate memory for as many.
        text_first: text rows lie before the others in memory, where `Segments` does not say where they lie.
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
    text_first: bool = False

    @classmethod
    def of(cls, query_order: TokenOrder, key_order: TokenOrder, partial_blocks: int | None = None) -> Geometry:
        """Queries and keys of one grid, each in an order of its own."""
        grid = key_order.grid
        return cls(
            grid.shape, grid.shape, query_order.block, key_order.block, query_order.tile, key_order.tile,
            grid.conditioning, grid.text, own_queries=False, partial_blocks=partial_blocks, text_first=grid.text_first,
        )  # fmt: skip

    @classmethod
    def of_visual(cls, query_order: TokenOrder, key_order: TokenOrder) -> Geometry:
        """The visual tokens of both alone, each in a grid of its own."""
        return dataclasses.replace(
            cls.of(query_order, key_order), query_grid=query_order.grid.shape, conditioning=0, text=0, own_queries=True
        )

    def pack(self) -> list[int]:
        """The integers in the order in which the custom ops carry them."""
        none = (0, 0, 0)
        partial_blocks = -1 if self.partial_blocks is None else self.partial_blocks
        return [
            *self.grid, *self.query_grid, self.block_q, self.block_k, *(self.tile_q or none), *(self.tile_k or none),
            self.conditioning, self.text, int(self.own_queries), partial_blocks, int(self.text_first),
        ]  # fmt: skip

    @classmethod
    def unpack(cls, ints: Sequence[int]) -> Geometry:
        """The inverse of `pack`."""
        return cls._unpack(tuple(map(int, ints)))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def _unpack(cls, v: tuple[int, ...]) -> Geometry:
        grid, query_grid, tile_q, tile_k = ((v[at], v[at + 1], v[at + 2]) for at in (0, 3, 8, 11))
        tiles = tile_q if any(tile_q) else None, tile_k if any(tile_k) else None
        partial_blocks = None if v[17] < 0 else v[17]
        return cls(grid, query_grid, v[6], v[7], *tiles, v[14], v[15], bool(v[16]), partial_blocks, bool(v[18]))

    @property
    def usual(self) -> tuple[int, int, int, int]:
        """The first visual, conditioning and text row and the length of the text, where `Segments` does not say."""
        keys = self.key_order.grid
        first = self.text if self.text_first else 0
        return first, first + keys.visual, 0 if first else keys.visual + keys.conditioning, keys.text

    @property
    def orders(self) -> tuple[TokenOrder, TokenOrder]:
        """`query_order` and `key_order`."""
        return _make_orders(self) if torch.compiler.is_compiling() else _kept_orders(self)

    @property
    def query_order(self) -> TokenOrder:
        """Query blocks over the canonical numbering of the queries."""
        return self.orders[0]

    @property
    def key_order(self) -> TokenOrder:
        """Key blocks over the canonical numbering of the keys."""
        return self.orders[1]


class BlockSparseInputs(NamedTuple):
    """A call, as every implementation takes it.

    q: [B, H, Nq, D]; k, v: [B, H, Nk, D]; any strides.
    lists, geometry, segments: what is listed, how both sides are cut, and where a sample's segments lie.
    scale: factor of the logits.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lists: BlockLists
    segments: Segments
    geometry: Geometry
    scale: float

    def pack(self) -> tuple[Any, ...]:
        """The arguments of the custom ops."""
        return *self[:3], *self.lists, *self.segments, self.geometry.pack(), self.scale

    @classmethod
    def unpack(cls, flat: Sequence[Any]) -> BlockSparseInputs:
        """The inverse of `pack`."""
        q, k, v, *records, geometry, scale = flat
        return cls(q, k, v, BlockLists(*records[:5]), Segments(*records[5:]), Geometry.unpack(geometry), scale)


def cut_blocks(lists: BlockLists, geometry: Geometry, cuts: Mapping[str, int]) -> tuple[BlockLists, Geometry]:
    """Lists over the parts of blocks that are too large: both attend the same pairs. The same lists if none is.

    Each part of a query block has its block's list. Each part of a key block stands in place of its block.

    Args:
        cuts: the most tokens of a block by `Geometry`'s field, "block_q" and "block_k". Larger ones are powers of two.
    """
    device, (query_order, key_order) = lists.indices.device, geometry.orders
    most_q, most_k = cuts.get("block_q", geometry.block_q), cuts.get("block_k", geometry.block_k)
    if query_order.block > most_q:
        query_order, parents = query_order.cut(most_q, device)
        partial = None if lists.partial is None else lists.partial[..., parents, :]
        lists = BlockLists(lists.indices[..., parents, :], lists.counts[..., parents], partial, lists.tables)
    while key_order.block > most_k:
        key_order, parents = key_order.halved(device)
        lists = _halve_keys(lists, parents)
    if (query_order, key_order) == geometry.orders:
        return lists, geometry
    parts = geometry.block_q // query_order.block * (geometry.block_k // key_order.block)
    return lists, dataclasses.replace(
        geometry, block_q=query_order.block, tile_q=query_order.tile, block_k=key_order.block, tile_k=key_order.tile,
        partial_blocks=None if geometry.partial_blocks is None else parts * geometry.partial_blocks,
    )  # fmt: skip


def _halve_keys(lists: BlockLists, parents: torch.Tensor) -> BlockLists:
    """Lists with both halves, or the only one, in place of each key block; `parents` as of `TokenOrder.halved`."""
    order = parents.argsort(stable=True)
    second = torch.nn.functional.pad(parents[order].diff() == 0, (1, 0)).long()
    halves = parents.new_full((len(parents), 2), -1).index_put((parents[order], second), order)
    used = lists.used[..., None]
    listed = torch.where(used, halves[torch.where(used[..., 0], lists.indices, 0).long()], -1).flatten(-2)
    there = listed >= 0
    place = torch.where(there, there.cumsum(-1) - 1, listed.shape[-1])

    def placed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], x.shape[-1] + 1).scatter(-1, place, x)[..., :-1]

    partial = None if lists.partial is None else placed(lists.partial.repeat_interleave(2, -1) & there)
    return BlockLists(placed(listed.clamp(min=0).int()), there.sum(-1, dtype=torch.int32), partial, lists.tables)


def _make_orders(geometry: Geometry) -> tuple[TokenOrder, TokenOrder]:
    text, conditioning = geometry.text, geometry.conditioning
    keys = TokenGrid(*geometry.grid, text=text, conditioning=conditioning)
    if geometry.own_queries:
        text = conditioning = 0
    queries = TokenGrid(*geometry.query_grid, text=text, conditioning=conditioning)
    return TokenOrder(queries, geometry.block_q, geometry.tile_q), TokenOrder(keys, geometry.block_k, geometry.tile_k)


_kept_orders = functools.lru_cache(maxsize=256)(_make_orders)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The `Segments` of one sample, read on the host."""

    visual_start: int
    conditioning_start: int
    text_start: int
    text_len: int

    def positions(self, grid: TokenGrid) -> torch.Tensor:
        """Row in memory of every canonical token of a grid: int64 [tokens]."""
        firsts = self.visual_start, self.conditioning_start, self.text_start
        counts = grid.visual, grid.conditioning, grid.text
        return torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)])

    def rows(self, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
        """Row in memory of every canonical token of queries and keys: int64 [tokens]."""
        queries, keys = geometry.orders
        return query_placement(geometry, self).positions(queries.grid), self.positions(keys.grid)


def read_placements(geometry: Geometry, batch: int, tokens: int, segments: Segments) -> list[Placement]:
    """Where the keys of each sample lie; waits for the device.

    Args:
        batch, tokens: samples, and rows of keys in each.

    Raises:
        DitAccelError: a segment leaves the sequence, two segments overlap, or a text length is out of range.
    """
    visual = geometry.key_order.grid.visual
    columns = [[u] * batch if t is None else t.tolist() for u, t in zip(geometry.usual, segments, strict=True)]
    placements = [Placement(*row) for row in zip(*columns, strict=True)]
    for place in set(placements):
        spans = [
            (place.visual_start, visual),
            (place.conditioning_start, geometry.conditioning),
            (place.text_start, geometry.text),
        ]
        spans = sorted((start, start + count) for start, count in spans if count)
        if spans[0][0] < 0 or spans[-1][1] > tokens or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise DitAccelError(
                f"A sample's segments must lie apart and within its {tokens} keys; got {place} for {visual} visual, "
                f"{geometry.conditioning} conditioning and {geometry.text} text tokens."
            )
        if not 0 <= place.text_len <= geometry.text:
            raise DitAccelError(f"text_len must be between 0 and text={geometry.text}, got {place.text_len}.")
    return placements


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """An empty result for x [B, H, N, D], laid out in memory as [B, N, H, D]."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def query_placement(geometry: Geometry, place: Placement) -> Placement:
    """The place of a sample's queries: that of its keys, or row 0 if they have their own grid."""
    return Placement(0, 0, 0, 0) if geometry.own_queries else place


_KIND_BAND = 1
_HEADER_WORDS = 8


@dataclasses.dataclass(frozen=True)
class _Axis:
    start: torch.Tensor  # int32 [length]
    stop: torch.Tensor
    step: int

    def refine(self, allowed: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
        """Clear the pairs of `allowed` [G, nq, nk] that this axis forbids; q, k: int32 coordinates [G, nq], [G, nk]."""
        start, stop, key = self.start[q][:, :, None], self.stop[q][:, :, None], k[:, None, :]
        if start.amax() > key.amin():
            allowed &= key >= start
        if stop.amin() <= key.amax():
            allowed &= key < stop
        if self.step > 1:
            allowed &= (key - start) % self.step == 0


class Predicate:
    """Decides visual pairs of two grids from packed tables, int32 [words] (format: `reference.allowed_pairs`)."""

    def __init__(self, tables: torch.Tensor, query_grid: Shape, grid: Shape) -> None:
        self.query_grid, self.grid = query_grid, grid
        self.terms: list[tuple[_Axis, ...] | torch.Tensor] = []
        for header in tables[1 : 1 + _HEADER_WORDS * int(tables[0])].reshape(-1, _HEADER_WORDS).tolist():
            kind, offsets, steps = header[0], header[1:4], header[4:7]
            if kind == _KIND_BAND:
                frames = query_grid[0], grid[0]
                self.terms.append(tables[offsets[0] :][: frames[0] * frames[1]].reshape(frames))
                continue
            axes = []
            for offset, step, length in zip(offsets, steps, query_grid, strict=True):
                table = tables[offset : offset + 2 * length].reshape(length, 2)
                axes.append(_Axis(table[:, 0].contiguous(), table[:, 1].contiguous(), step))
            self.terms.append(tuple(axes))

    def allowed(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The allowed pairs of visual tokens: bool [G, nq, nk] for int64 raster indices q [G, nq], k [G, nk]."""
        q_axes, k_axes = _coordinates(q, self.query_grid), _coordinates(k, self.grid)
        union = None
        for term in self.terms:
            if isinstance(term, torch.Tensor):
                place_q = (q % (self.query_grid[1] * self.query_grid[2])).int()
                place_k = (k % (self.grid[1] * self.grid[2])).int()
                radius = term[q_axes[0][:, :, None], k_axes[0][:, None, :]]
                allowed = (place_q[:, :, None] - place_k[:, None, :]).abs_() < radius
            else:
                allowed = torch.ones(*q.shape, k.shape[1], dtype=torch.bool, device=q.device)
                for axis, q_axis, k_axis in zip(term, q_axes, k_axes, strict=True):
                    axis.refine(allowed, q_axis, k_axis)
            union = allowed if union is None else union.logical_or_(allowed)
        if union is None:
            return torch.zeros(*q.shape, k.shape[1], dtype=torch.bool, device=q.device)
        return union


def _coordinates(index: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, height, width = shape
    frame, place = index // (height * width), index % (height * width)
    return frame.int(), (place // width).int(), (place % width).int()
