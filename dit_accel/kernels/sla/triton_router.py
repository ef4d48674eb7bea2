"""The router's kernels: block means, selection of critical and negligible blocks, and lists as the engine reads them.

A selection program holds the scores of a few query blocks in registers, as integers in the order of the scores. It
finds each row's threshold bit by bit and writes the lists. No blocks x blocks map is in memory, nothing is sorted, and
nothing waits for the device.

The rows of a program are two halves, a and b. Their counts share one integer, 16 bits each. The scores of a half are
several strips of columns, so a row's width need not be a power of two: `keys` is (strip 0 of a, strip 0 of b, strip 1
of a, ...).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import RUNTIME, load_rows, rows_of, tile_position
from dit_accel.kernels.sla.triton_linear import slots_of

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
LAST_RANK = tl.constexpr(-(2**13))  # the least rank of `triton_configs.MAX_BLOCKS` columns


@triton.jit
def store_mean(means, block, total, held, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store total [BLOCK_D] / held as column `block` of this head's means, fp32 [B, H, D, blocks]."""
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * D + o_d) * blocks + block
    tl.store(means + place, tl.div_rn(total, total * 0.0 + held), mask=o_d < D)


@triton.jit(do_not_specialize=RUNTIME)
def block_means_kernel(
    x, means,
    x_batch, x_head, x_row, T, H, W, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Store the mean of one block's tokens; see `store_mean`."""
    block = tl.program_id(0)
    rows, valid = slots_of(block, 0, (T, H, W), (BLOCK, TILE_T, TILE_H, TILE_W), BLOCK)
    b_x = load_rows(rows_of(x, (x_batch, x_head, x_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    total = tl.sum(b_x.to(tl.float32), 0)
    store_mean(means, block, total, tl.sum(valid.to(tl.float32), 0), tl.num_programs(0), D, BLOCK_D)


@triton.jit
def ordered(score):
    """Scores as integers in the same order; NaN counts as -inf, -0 as 0."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score == score, score, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ HIGHEST, bits)


@triton.jit
def reaches(key, level, cut, first_column, last, STRIP: tl.constexpr, TIED: tl.constexpr):
    """Whether keys [HALF, STRIP] reach their row's level. If TIED, a key at the level must also reach the cut by rank.

    Ranks are negative and fall from column to column; they rise if `last` is 1.
    """
    if TIED:
        column = first_column + tl.arange(0, STRIP)[None, :]
        rank = (column ^ (last - 1)) + LAST_RANK * last
        return (key > level[:, None]) | ((key == level[:, None]) & (rank >= cut[:, None]))
    else:
        return key >= level[:, None]


@triton.jit
def marks(keys, levels, cuts, unit, last, strip: tl.constexpr, STRIP: tl.constexpr, TIED: tl.constexpr):
    """Marks of a strip's columns, [HALF, STRIP]: 1 if a's key reaches its level, plus 1 << 16 if b's does.

    `unit` is a 1 that the compiler cannot see. A visible 1 becomes a bit of a word in local memory.
    """
    in_a = reaches(keys[2 * strip], levels[0], cuts[0], strip * STRIP, last, STRIP, TIED)
    in_b = reaches(keys[2 * strip + 1], levels[1], cuts[1], strip * STRIP, last, STRIP, TIED)
    return tl.where(in_a, unit, 0) + tl.where(in_b, unit << 16, 0)


@triton.jit
def bisected(
    keys, levels, wanted, unit, last,
    HALF: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """For each row of a and b a level that `wanted` keys reach, and whether more keys than wanted reach any of them.

    The level is found bit by bit from the highest, until exactly `wanted` keys reach it in every row. Without equal
    keys this takes a few bits beyond the exponent. TIED: finds the cut of each row at its given level.
    """
    found_a = tl.full([HALF], LAST_RANK if TIED else LOWEST, tl.int32)
    held_a = tl.full([HALF], STRIPS * STRIP, tl.int32)
    found_b, held_b = found_a, held_a
    bit = 12 if TIED else 31
    unsettled = 1
    while (bit >= 0) & (unsettled > 0):
        step = tl.full([HALF], 1, tl.int32) << bit
        next_a, next_b = found_a ^ step, found_b ^ step
        tried = levels if TIED else (next_a, next_b)
        total = marks(keys, tried, (next_a, next_b), unit, last, 0, STRIP, TIED)
        for strip in tl.static_range(1, STRIPS):
            total += marks(keys, tried, (next_a, next_b), unit, last, strip, STRIP, TIED)
        both = tl.sum(total, 1)
        reached_a, reached_b = both & 0xFFFF, both >> 16
        held_a = tl.where(reached_a >= wanted, reached_a, held_a)
        held_b = tl.where(reached_b >= wanted, reached_b, held_b)
        found_a = tl.where(reached_a >= wanted, next_a, found_a)
        found_b = tl.where(reached_b >= wanted, next_b, found_b)
        unsettled = tl.max(((held_a != wanted) | (held_b != wanted)).to(tl.int32), 0)
        bit -= 1
    return found_a, found_b, unsettled


@triton.jit
def write_best(
    lists, keys, first_row, rows, wanted, unit, last,
    HALF: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Store the columns of each row's `wanted` largest keys, ascending. Of equal keys the first count; the last if
    `last` is 1."""
    cut_a = tl.full([HALF], LOWEST, tl.int32)
    cut_b = cut_a
    level_a, level_b, unsettled = bisected(keys, (cut_a, cut_b), wanted, unit, last, HALF, STRIP, STRIPS, False)
    levels = level_a, level_b
    if unsettled > 0:
        cut_a, cut_b, _ = bisected(keys, levels, wanted, unit, last, HALF, STRIP, STRIPS, True)
    row = first_row + tl.arange(0, HALF)[:, None]
    before = tl.zeros([HALF], dtype=tl.int32)
    for strip in tl.static_range(STRIPS):
        marked = marks(keys, levels, (cut_a, cut_b), unit, last, strip, STRIP, True)
        place = before[:, None] + tl.cumsum(marked, 1) - marked
        before += tl.sum(marked, 1)
        column = strip * STRIP + tl.arange(0, STRIP)[None, :] + row * 0
        in_a, in_b = (marked & 0xFFFF) > 0, (marked >> 16) > 0
        tl.store(lists + row * wanted + (place & 0xFFFF), column, mask=in_a & (row < rows))
        tl.store(lists + (row + HALF) * wanted + (place >> 16), column, mask=in_b & (row + HALF < rows))


@triton.jit
def load_queries(means, count, HALF: tl.constexpr, WHOLE: tl.constexpr):
    """One dimension of HALF query means, [HALF, 1]; 0 beyond the first `count` unless WHOLE."""
    rows = tl.arange(0, HALF)
    if WHOLE:
        found = tl.load(means + rows)
    else:
        found = tl.load(means + rows, mask=rows < count, other=0.0)
    return found[:, None]


@triton.jit(do_not_specialize=RUNTIME)
def select_kernel(
    query_means, key_means, critical, negligible,
    rows, blocks, topk, skip,
    D: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The `topk` best of `blocks` key blocks for STEP of `rows` query blocks, and the `skip` worst, ascending.

    WIDTH >= blocks. If it is several strips, the blocks fill all but the last. WHOLE: there are at least STEP rows.
    """
    HALF: tl.constexpr = STEP // 2
    STRIPS: tl.constexpr = WIDTH // STRIP
    i_bh = tl.program_id(1).to(tl.int64)
    # the last program starts early instead of ending late: its rows need no mask, and the rows that two programs
    # write get the same values
    first_row = tl.minimum(tl.program_id(0) * STEP, tl.maximum(rows - STEP, 0))
    columns = tl.arange(0, STRIP)[None, :]
    # scalar bases with constant offsets: an address is one register and an immediate
    start_q = query_means + i_bh * D * rows + first_row
    start_k = key_means + i_bh * D * blocks
    scores = ()
    for _ in tl.static_range(2 * STRIPS):
        scores += (tl.zeros([HALF, STRIP], dtype=tl.float32),)  # type: ignore[assignment]
    for _ in tl.range(0, D, loop_unroll_factor=4):
        b_a = load_queries(start_q, rows - first_row, HALF, WHOLE)
        b_b = load_queries(start_q + HALF, rows - first_row - HALF, HALF, WHOLE)
        summed = ()
        for strip in tl.static_range(STRIPS):
            if strip + 1 < STRIPS:
                b_k = tl.load(start_k + strip * STRIP + columns)
            else:
                b_k = tl.load(start_k + strip * STRIP + columns, mask=strip * STRIP + columns < blocks, other=0.0)
            summed += (scores[2 * strip] + b_a * b_k, scores[2 * strip + 1] + b_b * b_k)  # type: ignore[assignment]
        scores = summed
        start_q += rows
        start_k += blocks
    keys = ()
    for part in tl.static_range(2 * STRIPS):
        keys += (ordered(scores[part]),)  # type: ignore[assignment]
    unit = tl.minimum(blocks, 1)
    lists, wanted = critical, topk
    for last in tl.range(0, 2 if HAS_SKIP else 1):
        inside = ()
        for part in tl.static_range(2 * STRIPS):
            if part // 2 + 1 < STRIPS:
                inside += (keys[part],)  # type: ignore[assignment]
            else:
                inside += (tl.where(part // 2 * STRIP + columns < blocks, keys[part], LOWEST),)  # type: ignore[assignment]
        start = lists + i_bh * rows * wanted
        write_best(start, inside, first_row, rows, wanted, unit, last, HALF, STRIP, STRIPS)
        # the worst blocks are the best by complemented keys, whose order is reversed
        keys = ()
        for part in tl.static_range(2 * STRIPS):
            keys += (~inside[part],)  # type: ignore[assignment]
        lists, wanted = negligible, skip


@triton.jit(do_not_specialize=RUNTIME)
def places_kernel(
    critical, places, spans, T, H, W, blocks, topk, dense,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Places [B, H, rows, topk + dense] and spans [B, H, rows, 5] of lists of critical blocks, a program each.

    They are those of `block_sparse.triton_lists.OrderedLists` without tables, made in one launch. Whole blocks come
    first, in order; then blocks with padding slots, in reverse order; then the `dense` blocks that every query block
    attends to.
    """
    row = tl.program_id(0).to(tl.int64)
    critical += row * topk
    places += row * (topk + dense)
    whole_seen = 0
    cut_seen = 0
    for first in range(0, topk, STEP):
        place = first + tl.arange(0, STEP)
        inside = place < topk
        block = tl.load(critical + place, mask=inside, other=0)
        if TILE_H == 0:
            corner = block * BLOCK
            whole = corner + BLOCK <= T * H * W
        else:
            t, h, w = tile_position(block, 0, H, W, TILE_T, TILE_H, TILE_W)
            corner = (t * H + h) * W + w
            whole = (t + TILE_T <= T) & (h + TILE_H <= H) & (w + TILE_W <= W)
        is_whole = (inside & whole).to(tl.int32)
        is_cut = inside.to(tl.int32) - is_whole
        whole_before = whole_seen + tl.cumsum(is_whole, 0) - is_whole
        cut_before = cut_seen + tl.cumsum(is_cut, 0) - is_cut
        place = tl.where(whole, whole_before, topk - 1 - cut_before)
        tl.store(places + place, tl.where(whole, corner, block), mask=inside)
        whole_seen += tl.sum(is_whole, 0)
        cut_seen += tl.sum(is_cut, 0)
    for first in range(0, dense, STEP):
        place = first + tl.arange(0, STEP)
        tl.store(places + topk + place, blocks + place, mask=place < dense)
    part = tl.arange(0, 8)
    ends = tl.where(part < 3, whole_seen, tl.where(part == 3, topk + dense, 0))
    tl.store(spans + row * 5 + part, ends, mask=part < 5)
