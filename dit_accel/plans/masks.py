"""The mask algebra: static masks as unions of disjoint terms, each a few small per-axis tables.

A term never holds a tensor of the size tokens x tokens. It counts exactly the (query, key) pairs of any box or run of
tokens. So it tells which blocks are empty, full or partial.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder

HEADER = 8  # words of a term's header in the packed tables

ROWS = 4096  # queries counted at once
MOST_FRAMES = 2048  # of a `Band`, whose table of all pairs of frames takes 32 MiB then
DENSE_AXIS = 1024  # longest axis that keeps its table of prefix counts
CORNER_ROWS = 64  # query blocks counted at once

FLOAT32_INTEGERS = 2**24  # float32 holds every integer up to here
SMALL_FRAME = 2**15  # pairs of two frames with fewer tokens are counted in 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class AxisTable:
    """Query i of one axis sees the keys start[i], start[i] + step, ... < stop[i]; `start` and `stop` are int64 [L]."""

    start: Tensor
    stop: Tensor
    step: int = 1

    @classmethod
    def full(cls, length: int) -> AxisTable:
        """Every position sees every position."""
        return cls(torch.zeros(length, dtype=torch.int64), torch.full((length,), length, dtype=torch.int64))

    @property
    def length(self) -> int:
        return self.start.numel()

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        start, stop = self.start.to(query.device)[query], self.stop.to(query.device)[query]
        return (key >= start) & (key < stop) & ((key - start) % self.step == 0)

    def prefix(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Pairs with query < queries[i] and key < keys[j]: int64 [len(queries), len(keys)], for any edges in [0, L]."""
        if self.length <= DENSE_AXIS:
            return self._prefix[queries][:, keys]
        return self._count(queries, keys)

    @functools.cached_property
    def _prefix(self) -> Tensor:
        edges = torch.arange(self.length + 1)
        return self._count(edges, edges)

    def _count(self, queries: Tensor, keys: Tensor) -> Tensor:
        edges, inverse = torch.unique(queries, return_inverse=True)
        counts = torch.zeros(len(edges) + 1, len(keys), dtype=torch.int64)
        for first in range(0, self.length, ROWS):
            start, stop = self.start[first : first + ROWS, None], self.stop[first : first + ROWS, None]
            seen = ((torch.minimum(keys, stop) - start + self.step - 1) // self.step).clamp_(min=0)
            position = torch.arange(first, first + len(start))
            counts.index_add_(0, torch.searchsorted(edges, position, right=True), seen)
        return counts.cumsum(0)[inverse]

    def meets(self, other: AxisTable) -> bool:
        """Whether some query sees some key in both tables."""
        low = torch.maximum(self.start, other.start)
        high = torch.minimum(self.stop, other.stop)
        key = self.start + (low - self.start + self.step - 1) // self.step * self.step
        for _ in range(other.step // math.gcd(self.step, other.step)):
            if ((key < high) & ((key - other.start) % other.step == 0)).any():
                return True
            key = key + self.step
        return False


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """``t[t_q, t_k] & h[h_q, h_k] & w[w_q, w_k]``."""

    t: AxisTable
    h: AxisTable
    w: AxisTable

    @property
    def axes(self) -> tuple[AxisTable, AxisTable, AxisTable]:
        return self.t, self.h, self.w

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.t.length, self.h.length, self.w.length

    def pairs(self) -> int:
        ends = [torch.tensor([axis.length]) for axis in self.axes]
        return math.prod(int(axis.prefix(end, end)) for axis, end in zip(self.axes, ends, strict=True))

    def allowed(self, query: Tensor, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        seen = [
            axis.allowed(q, k) for axis, q, k in zip(self.axes, unravel(query, shape), unravel(key, shape), strict=True)
        ]
        return seen[0] & seen[1] & seen[2]

    def tile_pairs(self, query: TokenOrder, key: TokenOrder) -> Tensor:
        assert query.tile is not None and key.tile is not None
        t, h, w = (
            axis_pairs(axis, tile_q, tile_k).to(torch.int32)
            for axis, tile_q, tile_k in zip(self.axes, query.tile, key.tile, strict=True)
        )
        rows = h[:, None, :, None] * w[None, :, None, :]  # [h_q, w_q, h_k, w_k]
        counts = t[:, None, None, :, None, None] * rows[None, :, :, None]
        return counts.reshape(query.visual_blocks, key.visual_blocks)

    def frame_prefix(self, t: Tensor, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """Pairs of frame t[i] and frame s[j] whose raster positions are < x[i] and < y[j]."""
        x_values, x_at = torch.unique(x, return_inverse=True)
        y_values, y_at = torch.unique(y, return_inverse=True)
        spatial = self._spatial_prefix(x_values, y_values)
        return spatial[x_at][:, y_at] * single(self.t, t, s)

    def _spatial_prefix(self, x: Tensor, y: Tensor) -> Tensor:
        # whole rows below both + the cut query row + the cut key row + the pairs of both cut rows
        width = self.w.length
        (row_x, col_x), (row_y, col_y) = (divmod_(x, width), divmod_(y, width))
        end = torch.tensor([width])
        whole = self.w.prefix(end, end)
        rows = self.h.prefix(row_x, row_y)
        query_row = self.h.prefix((row_x + 1).clamp(max=self.h.length), row_y) - rows
        key_row = self.h.prefix(row_x, (row_y + 1).clamp(max=self.h.length)) - rows
        return (
            rows * whole
            + query_row * self.w.prefix(col_x, end)
            + key_row * self.w.prefix(end, col_y)
            + single(self.h, row_x, row_y) * self.w.prefix(col_x, col_y)
        )

    def pack(self, offset: int) -> tuple[list[int], Tensor]:
        tables = [torch.stack((axis.start, axis.stop), 1).flatten() for axis in self.axes]
        offsets = list(itertools.accumulate((len(table) for table in tables[:2]), initial=offset))
        return [0, *offsets, *(axis.step for axis in self.axes), 0], torch.cat(tables)


def check_frames(frames: int) -> None:
    """Refuse a table of all pairs of so many frames that it does not fit into memory."""
    if frames > MOST_FRAMES:
        raise DitAccelError(
            f"A mask that differs by pairs of frames is made for at most {MOST_FRAMES:,} frames of tokens, got "
            f"{frames:,}. Use fewer frames, or gna, whose window needs no such table."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """``|p - p'| < radius[t, t']`` with p = h * W + w, the raster position inside a frame of `frame_tokens`.

    The radii are int64 [T, T]: 0 where a frame sees nothing of another, `frame_tokens` where it sees all of it.
    """

    radius: Tensor
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.radius), self.height, self.width

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    def pairs(self) -> int:
        n = torch.full_like(self.radius, self.frame_tokens)
        return int(band_pairs(self.radius, n, n).sum())

    def allowed(self, query: Tensor, key: Tensor, shape: tuple[int, int, int]) -> Tensor:
        (t, p), (s, r) = divmod_(query, self.frame_tokens), divmod_(key, self.frame_tokens)
        return (p - r).abs() < self.radius.to(query.device)[t, s]

    def tile_pairs(self, query: TokenOrder, key: TokenOrder) -> Tensor:
        assert query.tile is not None and key.tile is not None
        (tq, hq, wq), (tk, hk, wk) = query.tile, key.tile
        radii, kind = torch.unique(self.radius, return_inverse=True)
        frames = torch.nn.functional.one_hot(kind, len(radii)).movedim(-1, 0)  # [radii, T, T]
        frames = block_sum(block_sum(frames, 1, tq), 2, tk)  # [radii, t_q, t_k]
        areas = torch.stack([self._area_pairs(int(radius), (hq, wq), (hk, wk)) for radius in radii])
        exact = torch.float32 if query.block * key.block < FLOAT32_INTEGERS else torch.float64
        counts = torch.einsum("rab,rxy->axby", frames.to(exact), areas.to(exact))
        return counts.to(torch.int32).reshape(query.visual_blocks, key.visual_blocks)

    def _area_pairs(self, radius: int, query: tuple[int, int], key: tuple[int, int]) -> Tensor:
        """Pairs of two tiles of one frame: int64 [tiles_q, tiles_k]."""
        # |dh * W + dw| < radius depends on row and column distances alone: count their pairs, then sum
        rows = distance_pairs(self.height, query[0], key[0])  # [2H-1, h_q, h_k]
        columns = distance_pairs(self.width, query[1], key[1])  # [2W-1, w_q, w_k]
        dh = torch.arange(1 - self.height, self.height)[:, None]
        dw = torch.arange(1 - self.width, self.width)[None, :]
        near = ((dh * self.width + dw).abs() < radius).double()
        partly = near.any(1)
        seen = torch.einsum("hw,wcd->hcd", near[partly], columns)
        counts = torch.einsum("hab,hcd->acbd", rows[partly], seen)
        n_q, n_k = rows.shape[1] * columns.shape[1], rows.shape[2] * columns.shape[2]
        return counts.reshape(n_q, n_k).round().long()

    def frame_prefix(self, t: Tensor, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """As `Product.frame_prefix`."""
        kind = torch.int32 if self.frame_tokens < SMALL_FRAME else torch.int64
        radius = torch.nn.functional.pad(self.radius, (0, 1, 0, 1)).to(kind)[t][:, s]
        return band_pairs(radius, x.to(kind)[:, None], y.to(kind)[None, :])

    def pack(self, offset: int) -> tuple[list[int], Tensor]:
        return [1, offset, 0, 0, 0, 0, 0, 0], self.radius.flatten()


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A union of pairwise disjoint terms over the visual tokens of one grid; other terms are refused."""

    terms: tuple[Product | Band, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise DitAccelError("A mask needs at least one term, got none.")
        if len({term.shape for term in self.terms}) > 1:
            raise DitAccelError(f"The terms of a mask share one grid, got {[term.shape for term in self.terms]}.")
        for first, second in itertools.combinations(self.terms, 2):
            if overlap(first, second):
                raise DitAccelError(
                    f"The terms of a mask must be disjoint, but {type(first).__name__} and {type(second).__name__} "
                    "may share pairs. Split them by frames."
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.terms[0].shape

    def pairs(self) -> int:
        """Exact number of allowed (query, key) pairs of visual tokens."""
        return sum(term.pairs() for term in self.terms)

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether visual token `query` sees visual token `key`: bool, for broadcasting int64 raster indices."""
        return functools.reduce(torch.logical_or, (term.allowed(query, key, self.shape) for term in self.terms))

    def block_pairs(self, query: TokenOrder, key: TokenOrder) -> Tensor:
        """Allowed pairs in every pair of visual blocks, both tiles or both runs: int32 [query blocks, key blocks]."""
        if (query.tile is None) != (key.tile is None):
            raise DitAccelError("Queries and keys must both be in raster order or both in tiles.")
        count = raster_pairs if query.tile is None else lambda term, q, k: term.tile_pairs(q, k)
        return functools.reduce(torch.add, (count(term, query, key) for term in self.terms))

    def pack(self) -> Tensor:
        """The tables for the kernels: int32 [words]; `kernels.block_sparse.reference.allowed_pairs` has the format."""
        headers, tables, offset = [], [], 1 + HEADER * len(self.terms)
        for term in self.terms:
            header, table = term.pack(offset)
            headers += header
            tables.append(table)
            offset += len(table)
        return torch.cat([torch.tensor([len(self.terms), *headers]), *tables]).to(torch.int32)


def unravel(index: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of raster indices."""
    rest, column = divmod_(index, shape[2])
    frame, row = divmod_(rest, shape[1])
    return frame, row, column


def divmod_(value: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    return value // divisor, value % divisor


def single(axis: AxisTable, query: Tensor, key: Tensor) -> Tensor:
    """Whether position query[i] sees position key[j]: int64 [i, j]; positions behind the end see nothing."""
    last = axis.length - 1
    inside = (query <= last)[:, None] & (key <= last)[None, :]
    seen = axis.allowed(query.clamp(max=last)[:, None], key.clamp(max=last)[None, :])
    return (seen & inside).long()


def edges_of(length: int, size: int) -> Tensor:
    """Borders of the runs of `size` that cover an axis: 0, size, ..., length."""
    return torch.cat([torch.arange(0, length, size), torch.tensor([length])])


def axis_pairs(axis: AxisTable, query: int, key: int) -> Tensor:
    """Pairs in every pair of runs of `query` and `key` positions: int64 [runs_q, runs_k]."""
    prefix = axis.prefix(edges_of(axis.length, query), edges_of(axis.length, key))
    return prefix.diff(dim=0).diff(dim=1)


def block_sum(values: Tensor, dim: int, size: int) -> Tensor:
    """Sums over runs of `size` along `dim`; the last run may be shorter."""
    return prefix_sums(values, dim).index_select(dim, edges_of(values.shape[dim], size)).diff(dim=dim)


def distance_pairs(length: int, query: int, key: int) -> Tensor:
    """Pairs (i, j) of two runs at each distance i - j from 1 - length to length - 1: float64 [2 length - 1, q, k]."""
    low_q, low_k = edges_of(length, query)[:-1, None], edges_of(length, key)[None, :-1]
    high_q, high_k = edges_of(length, query)[1:, None], edges_of(length, key)[None, 1:]
    distance = torch.arange(1 - length, length)[:, None, None]
    common = torch.minimum(high_q - distance, high_k) - torch.maximum(low_q - distance, low_k)
    return common.clamp(min=0).double()


def band_pairs(radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pairs p < x, p' < y with |p - p'| < radius (broadcasting integers of one dtype)."""
    pairs = x * y
    for near, far in ((x, y), (y, x)):  # minus pairs with far position >= near position + radius
        reach = far - radius
        rows = torch.minimum(near, reach).clamp_(min=0)
        pairs = pairs - reach.mul_(2).add_(1).sub_(rows).mul_(rows).div_(2, rounding_mode="trunc")
    return pairs * (radius > 0)


def raster_pairs(term: Product | Band, query: TokenOrder, key: TokenOrder) -> Tensor:
    """Pairs in every pair of raster blocks, from counts of pairs below both ends: int32 [blocks_q, blocks_k].

    The pairs with query < X and key < Y are the sum of four parts, by whole and cut frames of queries and keys. The
    part of both cut frames changes with every block, the other three only at blocks that cross into another frame.
    """
    frames, height, width = term.shape
    n = height * width
    every, whole = torch.arange(frames), torch.full((frames,), n)
    total = prefix_sums(prefix_sums(term.frame_prefix(every, whole, every, whole).long(), 0), 1)  # [T+1, T+1]
    (t, x), (s, y) = (divmod_(edges_of(frames * n, order.block), n) for order in (query, key))
    # a few rows at a time, to stay in the processor's cache
    chunks = zip(t.split(CORNER_ROWS), x.split(CORNER_ROWS), strict=True)
    corners = torch.cat([term.frame_prefix(*chunk, s, y).to(torch.int32) for chunk in chunks])
    counts = corners.diff(dim=0).diff(dim=1)

    cut_query = prefix_sums(term.frame_prefix(t, x, every, whole).long(), 1)  # [edges_q, T+1]
    cut_key = prefix_sums(term.frame_prefix(every, whole, s, y).long(), 0)  # [T+1, edges_k]
    by_frame = (total[t] + cut_query).diff(dim=0)  # [blocks_q, T+1]: pairs with the key frames before
    columns, rows = (edge.diff().nonzero()[:, 0] for edge in (s, t))
    counts[:, columns] += (by_frame[:, s[columns + 1]] - by_frame[:, s[columns]]).to(torch.int32)
    by_frame = cut_key.diff(dim=1)  # [T+1, blocks_k]
    counts[rows] += (by_frame[t[rows + 1]] - by_frame[t[rows]]).to(torch.int32)
    return counts


def prefix_sums(values: Tensor, dim: int) -> Tensor:
    return torch.cat([torch.zeros_like(values.narrow(dim, 0, 1)), values.cumsum(dim)], dim)


def overlap(first: Product | Band, second: Product | Band) -> bool:
    """Whether two terms may share a pair; a product and a band are compared by frames alone."""
    if isinstance(first, Product) and isinstance(second, Product):
        return all(a.meets(b) for a, b in zip(first.axes, second.axes, strict=True))
    frames = torch.arange(first.shape[0])
    seen = [
        term.radius > 0 if isinstance(term, Band) else single(term.t, frames, frames) > 0 for term in (first, second)
    ]
    return bool((seen[0] & seen[1]).any())
