"""Block lists as the Triton kernels read them. Device tensors throughout: nothing here waits for the device."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.kernels.records import Lists, Visits
from dit_accel.order import TokenOrder

ALIGN = 4  # int32 in 16 bytes, to which compilers trust pointers to be aligned


class OrderedLists(NamedTuple):
    """The key blocks of each query block in four parts, one behind the other.

    1. Whole blocks of visual keys, which need no mask.
    2. Partial blocks without padding slots.
    3. Partial blocks with padding slots.
    4. Other blocks, which need a check of bounds alone.

    Args:
        entries: int32 [rows, width], block numbers.
        places: int32 [rows, width]. In parts 1 to 3 the raster index of the block's first token, which saves the
            kernels two divisions a step. In part 4 the block's number.
        spans: int32 [rows, 5], where each part ends, the fourth at the row's count. Last the number of the row's first
            partial block; partial blocks are numbered through all rows.
    """

    entries: torch.Tensor
    places: torch.Tensor
    spans: torch.Tensor

    def partial_blocks(self) -> torch.Tensor:
        """Partial blocks of all rows: int32 []."""
        last = self.spans[-1:]
        return (last[:, 4] + last[:, 2] - last[:, 0]).sum()

    def numbers(self) -> torch.Tensor:
        """Number of each entry's partial block, -1 for other entries: int32 [rows, width]."""
        pure, _, tabled, _, first = self.spans[:, :, None].unbind(1)
        place = torch.arange(self.entries.shape[1], dtype=torch.int32, device=self.entries.device)
        return torch.where((place >= pure) & (place < tabled), first + place - pure, -1)


class Transposed(NamedTuple):
    """The query blocks that visit each key block, in two parts: visual ones without padding slots, then the others.

    The lists stand one behind the other. Query blocks ascend in each part, so sums over them have a fixed order.

    Args:
        entries: int32 [leading * query_blocks * width], query blocks.
        places: int32, shape of `entries`: the raster index of a block's first token in the first part, else the block.
        numbers: int32, shape of `entries`: numbers of their partial blocks, or -1; None if there are none.
        firsts: int32 [leading, 2 * key_blocks + 1], where each part begins.
    """

    entries: torch.Tensor
    places: torch.Tensor
    numbers: torch.Tensor | None
    firsts: torch.Tensor

    def visits(self, lists: Lists) -> Visits:
        """What the kernel of dk and dv reads, with the words of `lists`."""
        numbers = self.places if self.numbers is None else self.numbers  # without tables no numbers are read
        return Visits(self.entries, self.places, numbers, self.firsts, lists.words, lists.per_head)


def order_lists(lists: BlockLists, geometry: Geometry) -> OrderedLists:
    """Order each list for the kernels."""
    kv_indices, _, partial, tables, _ = lists
    width = kv_indices.shape[-1]
    entries = kv_indices.reshape(-1, width)
    used = lists.used.reshape(-1, width)
    padded, corners = _blocks(geometry.key_order, kv_indices.device)
    padded = padded[torch.where(used, entries, 0)].int()
    part = 3 * padded
    if tables is not None:
        needs = kv_indices < geometry.key_order.visual_blocks
        needs[..., geometry.query_order.visual_blocks :, :] = False
        needs = needs if partial is None else needs & partial
        part = torch.where(needs.reshape(-1, width), 1 + padded, part)
    parts, order = torch.where(used, part, 4).sort(dim=-1, stable=True)
    bounds = torch.arange(1, 5, dtype=parts.dtype, device=parts.device).expand(len(parts), -1).contiguous()
    ends = torch.searchsorted(parts, bounds, out_int32=True)
    tabled = ends[:, 2] - ends[:, 0]
    first = tabled.cumsum(0, dtype=torch.int32) - tabled
    entries = torch.where(used, entries, 0).gather(1, order)
    places = torch.where(parts < 3, corners[entries], entries)
    return OrderedLists(entries, places, torch.cat([ends, first[:, None]], 1))


def transpose_lists(
    kv_indices: torch.Tensor, kv_counts: torch.Tensor, geometry: Geometry, numbers: torch.Tensor | None = None
) -> Transposed:
    """Turn lists of key blocks, in any order, into lists of query blocks by a stable sort.

    Args:
        kv_indices, kv_counts, geometry: see `geometry.BlockLists` and `api.attend_blocks`.
        numbers: int32, as many as `kv_indices`, numbers of partial blocks; None: there are none.
    """
    query_blocks, width = kv_indices.shape[-2:]
    key_blocks = geometry.key_order.blocks
    padded, corners = _blocks(geometry.query_order, kv_indices.device)
    parts = 2 * torch.where(BlockLists(kv_indices, kv_counts).used, kv_indices, key_blocks) + padded.int()[:, None]
    parts, order = parts.reshape(math.prod(kv_indices.shape[:-2]), query_blocks * width).sort(dim=-1, stable=True)
    bounds = torch.arange(2 * key_blocks + 1, dtype=parts.dtype, device=parts.device).expand(len(parts), -1)
    firsts = torch.searchsorted(parts, bounds.contiguous(), out_int32=True)
    start = torch.arange(len(parts), dtype=torch.int32, device=parts.device)[:, None] * (query_blocks * width)
    entries = (order // width).to(torch.int32)
    places = torch.where(parts % 2 == 0, corners[entries], entries)
    if numbers is not None:
        numbers = numbers.reshape(parts.shape).gather(-1, order).flatten()
    return Transposed(entries.flatten(), places.flatten(), numbers, firsts + start)


def both_ways(lists: BlockLists, geometry: Geometry) -> tuple[OrderedLists, Transposed]:
    """Lists for the forward and dq kernels, and for dk and dv."""
    ordered = order_lists(lists, geometry)
    numbers = None if lists.tables is None else ordered.numbers()
    return ordered, transpose_lists(ordered.entries.view_as(lists.indices), lists.counts, geometry, numbers)


def pack(lists: BlockLists, geometry: Geometry) -> torch.Tensor:
    """What `both_ways` gives, in one tensor that a call can be given and its backward can keep: int32 [words].

    Raises:
        DitAccelError: `geometry.partial_blocks` is too small.
    """
    ordered, transposed = both_ways(lists, geometry)
    most = geometry.partial_blocks
    if most is not None and lists.tables is not None and int(ordered.partial_blocks()) > most:
        raise DitAccelError(f"{int(ordered.partial_blocks())} blocks are partial, more than partial_blocks={most}.")
    parts = (part.flatten() for part in (*ordered, *transposed) if part is not None)
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % ALIGN)) for part in parts])


def opened(lists: BlockLists, geometry: Geometry) -> BlockLists:
    """Packed lists as a plan keeps them for calls outside the custom op: views, made once."""
    return lists._replace(packed=split(lists, geometry))


def split(lists: BlockLists, geometry: Geometry) -> tuple[OrderedLists, Transposed]:
    """The inverse of `pack`: views of `lists.packed`.

    Raises:
        DitAccelError: it was not made of lists of this shape.
    """
    kv_indices, _, _, tables, joined = lists
    if isinstance(joined, tuple):
        return joined
    assert joined is not None
    parts, words = _parts(geometry, kv_indices.shape[-1], tables is not None)
    if kv_indices.ndim != 2 or joined.dtype != torch.int32 or tuple(joined.shape) != (words,):
        raise DitAccelError(
            f"packed must be what pack() made of these lists, int32 [{words}] and no head axis; got {joined.dtype} "
            f"{list(joined.shape)} beside lists {list(kv_indices.shape)}."
        )
    views = [joined.as_strided(*part) for part in parts]
    numbers = None if tables is None else views[5]
    return OrderedLists(*views[:3]), Transposed(views[3], views[4], numbers, views[-1])


@functools.lru_cache(maxsize=256)
def _parts(geometry: Geometry, width: int, numbered: bool) -> tuple[list[tuple[Any, ...]], int]:
    """Shape, strides and beginning of what `pack` puts behind each other, and the whole length."""
    rows, columns = geometry.query_order.blocks, geometry.key_order.blocks
    listed = [(rows * width,)] * (2 + numbered)
    parts, begin = [], 0
    for shape in ((rows, width), (rows, width), (rows, 5), *listed, (1, 2 * columns + 1)):
        parts.append((shape, (*shape[1:], 1), begin))
        begin += math.prod(shape) + -math.prod(shape) % ALIGN
    return parts, begin


def _blocks(order: TokenOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block, whether its slots need a check (bool), and for visual ones the index of the first token (int32).

    Text blocks always need one, for text lengths vary. Made on the device in each call: a tensor that is kept may lie
    in the memory of a CUDA graph.
    """
    _, height, width = order.grid.shape
    tile, lengths = (order.tile, order.grid.shape) if order.tile else ((1, 1, order.block), (1, 1, order.grid.visual))
    firsts = [
        torch.arange(n, dtype=torch.int32, device=device) * size for n, size in zip(order.tiles, tile, strict=True)
    ]
    cut = [first + size > length for first, size, length in zip(firsts, tile, lengths, strict=True)]
    corners = (firsts[0][:, None, None] * height + firsts[1][:, None]) * width + firsts[2]
    corners = corners.flatten()
    padded = (cut[0][:, None, None] | cut[1][:, None] | cut[2]).flatten()
    pad = torch.nn.functional.pad
    return pad(padded, (0, order.dense_blocks), value=True), pad(corners, (0, order.dense_blocks))
