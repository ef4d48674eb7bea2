"""What kernels take and pass on: records of pointers and numbers, for the host and for device code.

A member is a tensor or an integer on the host, and a pointer or a number in a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dit_accel.kernels.block_sparse.geometry import Geometry, Segments
from dit_accel.order import TokenOrder


class Heads(NamedTuple):
    """A tensor [B, H, N, D] that is read, and its strides in units of ALIGN elements.

    In these units the compiler knows that rows are aligned, and loads 16 bytes at a time.
    """

    start: Any
    batch: Any
    head: Any
    row: Any

    @classmethod
    def of(cls, x: torch.Tensor, align: int) -> Heads:
        batch, head, row, _ = x.stride()
        return cls(x, batch // align, head // align, row // align)


class HeadRows(NamedTuple):
    """One head of a tensor: its first row, and elements from row to row."""

    start: Any
    distance: Any


class KeyRows(NamedTuple):
    """`HeadRows` of keys in 8 bits, and the size of each block's steps, at the row of its first token."""

    start: Any
    distance: Any
    steps: Any


class Side(NamedTuple):
    """Queries or keys: frames, rows and columns of the grid, other tokens, rows in memory, and blocks."""

    T: Any
    H: Any
    W: Any
    conditioning: Any
    text: Any
    tokens: Any
    blocks: Any

    @classmethod
    def of(cls, order: TokenOrder, tokens: int) -> Side:
        grid = order.grid
        return cls(*grid.shape, grid.conditioning, grid.text, tokens, order.blocks)


class SegmentRows(NamedTuple):
    """`geometry.Segments` in a kernel: of samples tensors, of one sample the first rows and the valid text tokens."""

    visual_start: Any
    conditioning_start: Any
    text_start: Any
    text_len: Any


class SampleSegments(NamedTuple):
    """Where the segments of samples begin.

    Attributes:
        tensors: `SegmentRows` of samples; what is not given is not read.
        usual: the same of samples of which nothing is given.
        present: bit 0 says that the starts are read, bit 1 the lengths of text.
        shared_rows: 1 if the queries are the keys' tokens, 0 if they are visual tokens from row 0 on.
    """

    tensors: Any
    usual: Any
    present: Any
    shared_rows: Any

    @classmethod
    def of(cls, segments: Segments, geometry: Geometry, unread: torch.Tensor) -> SampleSegments:
        """`unread`: any int32 tensor, in place of those that are not given."""
        present = (segments.visual_start is not None) + 2 * (segments.text_len is not None)
        tensors = SegmentRows(*(unread if x is None else x for x in segments))
        return cls(tensors, SegmentRows(*geometry.usual), present, int(not geometry.own_queries))


class Lists(NamedTuple):
    """`triton_lists.OrderedLists`, with the words of their partial blocks; 1 for a list of every head, else 0."""

    places: Any
    spans: Any
    words: Any
    width: Any
    per_head: Any


class KeyList(NamedTuple):
    """One row of `Lists`: its places, where each part ends, and the number of its first partial block."""

    places: Any
    pure: Any
    clean: Any
    tabled: Any
    count: Any
    number: Any


class Visits(NamedTuple):
    """`triton_lists.Transposed`, with the words of partial blocks; 1 for a list of every head, else 0."""

    entries: Any
    places: Any
    numbers: Any
    firsts: Any
    words: Any
    per_head: Any


class PseudoKeys(NamedTuple):
    """Mean keys and mean values of blocks, which stand for them in the tail.

    k, v: [B, H, blocks, D]; logs: natural logarithms of the blocks' tokens, fp32 [blocks].
    outside: uint8 [B, H, query blocks, blocks], 1 where a block is not in the tail.
    """

    k: Any
    v: Any
    logs: Any
    outside: Any
    blocks: Any


class Corner(NamedTuple):
    """Where a block lies: in the grid, and as a run from `place` on in a segment of `size` tokens from row `first`."""

    is_visual: Any
    t: Any
    h: Any
    w: Any
    first: Any
    size: Any
    place: Any


class Query(NamedTuple):
    """A block of queries in registers; for gradients also go, lse and delta of README.md."""

    q: Any
    grad_out: Any
    lse: Any
    delta: Any
