"""The kernel that writes the bits of partial blocks, as words; `triton_tokens` says what they are, and reads them."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import first_slots, key_list, visual_slots
from dit_accel.kernels.jit import kernel


@triton.jit
def slots_between(left, right, base, step):
    """The slots of [left, right) that are a multiple of `step` away from `base`: int64, slots 0 to 63."""
    # of 64-bit numbers, which takes fewer registers here
    slots = first_slots(right.to(tl.int64)) & ~first_slots(left.to(tl.int64))
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
def line_of(i, block, side, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The i-th image row in a visual block: frame, row, its slots [left, right) and the column of slot 0."""
    if TILE[1] == 0:
        line = block * BLOCK // side.W + i
        t, h = line // side.H, line % side.H
        column = block * BLOCK - line * side.W
        left = tl.maximum(-column, 0)
        right = tl.minimum(side.W - column, BLOCK)
    else:
        tiles_h = tl.cdiv(side.H, TILE[1])
        tiles_w = tl.cdiv(side.W, TILE[2])
        t = block // (tiles_h * tiles_w) * TILE[0] + i // TILE[1]
        h = block // tiles_w % tiles_h * TILE[1] + i % TILE[1]
        left = i * TILE[2]
        column = block % tiles_w * TILE[2] - left
        right = tl.minimum(left + TILE[2], side.W - column)
    right = tl.where((t < side.T) & (h < side.H), right, left)
    return tl.minimum(t, side.T - 1), tl.minimum(h, side.H - 1), left, right, column


@triton.jit
def seen_slots(tables, query, block, queries, keys, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The slots of a visual key block that each query (raster index) sees: words of slots 0-63 and 64-127."""
    if TILE[1] == 0:
        stop = tl.minimum(block * BLOCK + BLOCK, keys.T * keys.H * keys.W)
        lines = (stop - 1) // keys.W - block * BLOCK // keys.W + 1
    else:
        lines = TILE[0] * TILE[1]
    frame, place = query // (queries.H * queries.W), query % (queries.H * queries.W)
    row, column_q = place // queries.W, place % queries.W
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
            if TILE[1] == 0:
                for i in range(lines):
                    t, h, left, right, column = line_of(i, block, keys, BLOCK, TILE)
                    seen = axis_sees(start_t, stop_t, step_t, t) & axis_sees(start_h, stop_h, step_h, h)
                    base = start_w - column
                    first = tl.maximum(base, left)
                    last = tl.where(seen, tl.minimum(stop_w - column, right), first)
                    low_word |= slots_between(first, last, base, step_w)
                    if BLOCK > 64:
                        high_word |= slots_between(first - 64, last - 64, base - 64, step_w)
            else:  # the same columns in every image row
                t, h, left, right, column = line_of(0, block, keys, BLOCK, TILE)
                base = start_w - column
                first, last = tl.maximum(base, 0), tl.minimum(stop_w - column, right)
                across = slots_between(first, last, base, step_w)
                beyond = across * 0
                if TILE[2] > 64:
                    beyond = slots_between(first - 64, last - 64, base - 64, step_w)
                for i in range(lines):
                    t, h, left, right, column = line_of(i, block, keys, BLOCK, TILE)
                    seen = axis_sees(start_t, stop_t, step_t, t) & axis_sees(start_h, stop_h, step_h, h)
                    seen = seen & (left < right)
                    moved = across << (left % 64)
                    low_word |= tl.where(seen & (left < 64), moved, 0)
                    if BLOCK > 64:
                        high_word |= tl.where(seen, tl.where(left < 64, beyond, moved), 0)
        else:
            for i in range(lines):
                t, h, left, right, column = line_of(i, block, keys, BLOCK, TILE)
                radius = tl.load(off_t + frame * keys.T + t)
                middle = place - h * keys.W - column  # slot at the query's own raster position
                first = tl.maximum(middle - radius + 1, left)
                last = tl.where(radius > 0, tl.minimum(middle + radius, right), first)
                low_word |= slots_between(first, last, 0, 1)
                if BLOCK > 64:
                    high_word |= slots_between(first - 64, last - 64, 0, 1)
    return low_word, high_word


@kernel
def partial_words_kernel(
    words, lists, tables, keys, queries,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The words of the partial blocks of one list; the programs of the second axis share its blocks.

    `lists` are those of `triton_lists.OrderedLists`, with the blocks' numbers in place of places.
    """
    row = tl.program_id(0)
    listed = key_list(row, lists)
    pure, tabled = listed.pure, listed.tabled
    slot_q = tl.arange(0, BLOCK_Q)
    _, _, query = visual_slots(row % queries.blocks, slot_q, queries, BLOCK_Q, TILE_Q)
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    for i in range(pure + tl.program_id(1), tabled, tl.num_programs(1)):
        block = tl.load(listed.places + i)
        low, high = seen_slots(tables, query, block, queries, keys, BLOCK_K, TILE_K)
        p_words = words + (listed.number + i - pure).to(tl.int64) * (WORDS * BLOCK_Q) + slot_q
        tl.store(p_words, low)
        if BLOCK_K > 64:
            tl.store(p_words + BLOCK_Q, high)
