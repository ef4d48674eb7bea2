"""Which pairs of a partial block the packed tables allow (format: `masks.Mask.pack`), within few registers.

A query's keys in one block are a set of slots, and a set of 64 slots is one 64-bit word. So the tables are asked once
a query and image row of keys, on vectors of queries, and only the last step, a bit test, is done for every pair.
Asking pair by pair instead keeps the bounds of 32 queries in each thread: a thousand bytes of spills on sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import PARTIAL


@triton.jit
def below(count):
    """The slots 0, ..., count - 1 as a word, for any count: int64."""
    count = tl.minimum(tl.maximum(count, 0), 64).to(tl.int64)
    one = tl.full([1], 1, tl.int64)
    return tl.where(count > 63, -one, (one << tl.minimum(count, 63)) - one)


@triton.jit
def slots_between(left, right, base, step):
    """The slots of [left, right) that are a multiple of `step` away from `base`: int64, slots 0 to 63."""
    slots = below(right) & ~below(left)
    if step > 1:
        one = tl.full([1], 1, tl.int64)
        comb = slots * 0
        first = ((base % step) + step) % step
        for i in range(tl.cdiv(64, step)):
            slot = (first + i * step).to(tl.int64)
            comb |= tl.where(slot < 64, one << tl.minimum(slot, 63), 0)
        slots &= comb
    return slots


@triton.jit
def axis_sees(start, stop, step, key):
    seen = (key >= start) & (key < stop)
    if step > 1:
        seen = seen & ((key - start) % step == 0)
    return seen


@triton.jit
def line_of(i, block, T, H, W, BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The i-th image row in a visual block: frame, row, its slots [left, right) and the column of slot 0."""
    if TILE_H == 0:
        line = block * BLOCK // W + i
        t, h = line // H, line % H
        column = block * BLOCK - line * W
        left = tl.maximum(-column, 0)
        right = tl.minimum(W - column, BLOCK)
    else:
        tiles_h = tl.cdiv(H, TILE_H)
        tiles_w = tl.cdiv(W, TILE_W)
        t = block // (tiles_h * tiles_w) * TILE_T + i // TILE_H
        h = block // tiles_w % tiles_h * TILE_H + i % TILE_H
        left = i * TILE_W
        right = left + TILE_W
        column = block % tiles_w * TILE_W - left
    right = tl.where((t < T) & (h < H), right, left)
    return tl.minimum(t, T - 1), tl.minimum(h, H - 1), left, right, column


@triton.jit
def seen_slots(
    tables, query, block, QH, QW, T, H, W,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The slots of a visual key block that each query (raster index) sees: words of slots 0-63 and 64-127."""
    if TILE_H == 0:
        lines = (tl.minimum(block * BLOCK + BLOCK, T * H * W) - 1) // W - block * BLOCK // W + 1
    else:
        lines = TILE_T * TILE_H
    frame, place = query // (QH * QW), query % (QH * QW)
    row, column_q = place // QW, place % QW
    low_word = query.to(tl.int64) * 0
    high_word = low_word
    for term in range(tl.load(tables)):
        header = tables + 1 + 8 * term
        kind = tl.load(header)
        off_t = tables + tl.load(header + 1)
        if kind == 0:
            off_h, off_w = tables + tl.load(header + 2), tables + tl.load(header + 3)
            step_t, step_h, step_w = tl.load(header + 4), tl.load(header + 5), tl.load(header + 6)
            start_t, stop_t = tl.load(off_t + 2 * frame), tl.load(off_t + 2 * frame + 1)
            start_h, stop_h = tl.load(off_h + 2 * row), tl.load(off_h + 2 * row + 1)
            start_w, stop_w = tl.load(off_w + 2 * column_q), tl.load(off_w + 2 * column_q + 1)
            for i in range(lines):
                t, h, left, right, column = line_of(i, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                seen = axis_sees(start_t, stop_t, step_t, t) & axis_sees(start_h, stop_h, step_h, h)
                base = start_w - column
                first = tl.maximum(base, left)
                last = tl.where(seen, tl.minimum(stop_w - column, right), first)
                low_word |= slots_between(first, last, base, step_w)
                if BLOCK > 64:
                    high_word |= slots_between(first - 64, last - 64, base - 64, step_w)
        else:
            for i in range(lines):
                t, h, left, right, column = line_of(i, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                radius = tl.load(off_t + frame * T + t)
                middle = place - h * W - column  # slot at the query's own raster position
                first = tl.maximum(middle - radius + 1, left)
                last = tl.where(radius > 0, tl.minimum(middle + radius, right), first)
                low_word |= slots_between(first, last, 0, 1)
                if BLOCK > 64:
                    high_word |= slots_between(first - 64, last - 64, 0, 1)
    return low_word, high_word


@triton.jit
def words_of(
    entry, tables, query, block, QH, QW, T, H, W,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The slots of a key block that each query sees: by the tables where the list's entry says so, else all.

    Asked before the products of a block: their operands leave no registers for it (200 bytes of spills on sm_80).
    """
    low_word = query.to(tl.int64) * 0 - 1
    high_word = low_word
    if entry >= PARTIAL:
        low_word, high_word = seen_slots(tables, query, block, QH, QW, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
    return low_word, high_word


@triton.jit
def holds(low_word, high_word, slot, BLOCK: tl.constexpr):
    """Whether the words hold a slot: bool, for words and slots that broadcast."""
    if BLOCK > 64:
        word = tl.where(slot < 64, low_word, high_word)
    else:
        word = low_word
    return ((word >> (slot % 64).to(tl.int64)) & 1) != 0
