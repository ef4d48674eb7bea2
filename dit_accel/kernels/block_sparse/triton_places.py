"""Block lists of a call as the forward kernels read them, without a sort: one launch, one program a list."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.triton_configs import PLACES
from dit_accel.kernels.block_sparse.triton_tokens import tile_position
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import Side
from dit_accel.order import TokenOrder


def place_lists(indices: Tensor, counts: Tensor | None, order: TokenOrder, dense: int = 0) -> tuple[Tensor, Tensor]:
    """Places and spans of lists without tables, as `triton_lists.OrderedLists` has them. Nothing waits for the device.

    Whole blocks come first, then all others, both in the order of the list; then the `dense` blocks behind the visual
    ones. This is the order of packed lists, so sums have the same bits. Places behind a list's end hold anything.

    Args:
        indices: int32 [..., rows, width], key blocks.
        counts: int32 [..., rows], entries that count; None: all.
        order: how the keys are cut.
        dense: conditioning and text blocks that each list has besides.

    Returns:
        int32 [..., rows, width + dense] and [..., rows, 5].
    """
    rows, width = indices.shape[:-1], indices.shape[-1]
    places, spans = indices.new_empty(*rows, width + dense), indices.new_empty(*rows, 5)
    indices = indices.contiguous()
    tuning.launch(
        place_lists_kernel, (math.prod(rows), 1),
        (
            indices, indices if counts is None else counts.contiguous(), places, spans,
            Side.of(order, order.grid.tokens), order.visual_blocks, width, width if counts is None else -1, dense,
        ),
        tuning.block_sizes(order), (PLACES,), (),
    )  # fmt: skip
    return places, spans


@triton.jit
def listed_blocks(indices, first, count, keys, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """STEP blocks of a list from `first`, the raster index of the first token of each, which are listed or whole."""
    place = first + tl.arange(0, STEP)
    inside = place < count
    block = tl.load(indices + place, mask=inside, other=0)
    if TILE[1] == 0:
        corner = block * BLOCK
        whole = corner + BLOCK <= keys.T * keys.H * keys.W
    else:
        t, h, w = tile_position(block, 0, keys, TILE)
        corner = (t * keys.H + h) * keys.W + w
        whole = (t + TILE[0] <= keys.T) & (h + TILE[1] <= keys.H) & (w + TILE[2] <= keys.W)
    return block, corner, inside, (inside & whole).to(tl.int32)


@kernel
def place_lists_kernel(
    indices, counts, places, spans, keys, blocks, width, topk, dense,
    BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Places [rows, width + dense] and spans [rows, 5] of lists [rows, width]; see `place_lists`.

    A list has `topk` entries, or as many as `counts` says if that is negative.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row, mask=topk < 0, other=topk)
    indices += row * width
    places += row * (width + dense)
    whole_count = 0
    for first in range(0, count, STEP):
        _block, _corner, _inside, is_whole = listed_blocks(indices, first, count, keys, BLOCK, TILE, STEP)
        whole_count += tl.sum(is_whole, 0)
    whole_seen = 0
    cut_seen = 0
    for first in range(0, count, STEP):
        block, corner, inside, is_whole = listed_blocks(indices, first, count, keys, BLOCK, TILE, STEP)
        is_cut = inside.to(tl.int32) - is_whole
        whole_before = whole_seen + tl.cumsum(is_whole, 0) - is_whole
        cut_before = cut_seen + tl.cumsum(is_cut, 0) - is_cut
        place = tl.where(is_whole != 0, whole_before, whole_count + cut_before)
        tl.store(places + place, tl.where(is_whole != 0, corner, block), mask=inside)
        whole_seen += tl.sum(is_whole, 0)
        cut_seen += tl.sum(is_cut, 0)
    for first in range(0, dense, STEP):
        place = first + tl.arange(0, STEP)
        tl.store(places + count + place, blocks + place, mask=place < dense)
    part = tl.arange(0, 8)
    ends = tl.where(part < 3, whole_seen, tl.where(part == 3, count + dense, 0))
    tl.store(spans + row * 5 + part, ends, mask=part < 5)
