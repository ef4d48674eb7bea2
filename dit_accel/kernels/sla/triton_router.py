"""The router's kernels: block means in one pass over q and over k, then a selection by bisection, row by row.

A program holds the scores of a few query blocks in registers as integers that order as the scores do. It finds the
threshold bit by bit and writes the lists: no blocks x blocks map in memory, no sort, no wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_rows import load_rows, rows_of, slots_of

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def store_mean(means, block, total, held, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """total [BLOCK_D] / held, into column `block` of this program's head of means: fp32 [B, H, D, blocks]."""
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * D + o_d) * blocks + block
    tl.store(means + place, tl.div_rn(total, total * 0.0 + held), mask=o_d < D)


@triton.jit(do_not_specialize=["x_batch", "x_head", "x_row", "T", "H", "W", "heads"])
def block_means_kernel(
    x, means,
    x_batch, x_head, x_row, T, H, W, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Mean of the tokens of one block; see `store_mean`."""
    block = tl.program_id(0)
    rows, valid = slots_of(block, 0, (T, H, W), (BLOCK, TILE_T, TILE_H, TILE_W), BLOCK)
    b_x = load_rows(rows_of(x, (x_batch, x_head, x_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    total = tl.sum(b_x.to(tl.float32), 0)
    store_mean(means, block, total, tl.sum(valid.to(tl.float32), 0), tl.num_programs(0), D, BLOCK_D)


@triton.jit
def ordered(score):
    """An integer for every score that orders as the scores do; NaN counts as -inf, -0 as 0."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score == score, score, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ HIGHEST, bits)


@triton.jit
def count(holds):
    """How many hold in each row: int32. Summed as floats: LLVM counts bits of predicates by way of local memory."""
    return tl.sum(tl.where(holds, 1.0, 0.0), 1).to(tl.int32)


@triton.jit
def threshold_of(keys, wanted, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """A number per row that at least `wanted` keys reach and at most `wanted` exceed.

    Bisected from the highest bit on, until as many as wanted reach it in every row: a few bits beyond the exponent, but
    for equal keys.
    """
    threshold = tl.full([STEP], LOWEST, tl.int32)
    held = tl.full([STEP], WIDTH, tl.int32)
    bit = 31
    unsettled = 1
    while (bit >= 0) & (unsettled > 0):
        higher = threshold ^ (tl.full([STEP], 1, tl.int32) << bit)
        reached = count(keys >= higher[:, None])
        held = tl.where(reached >= wanted, reached, held)
        threshold = tl.where(reached >= wanted, higher, threshold)
        unsettled = tl.max((held != wanted).to(tl.int32), 0)
        bit -= 1
    return threshold


@triton.jit
def write_best(
    lists, keys, wanted, columns, first_place, written,
    STEP: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The columns of the `wanted` largest keys of each row, ascending; of equal keys the first, or the LAST."""
    threshold = threshold_of(keys, wanted, STEP, WIDTH)
    above = (keys > threshold[:, None]).to(tl.int32)
    level = (keys == threshold[:, None]).to(tl.int32)
    room = (wanted - count(keys > threshold[:, None]))[:, None]
    # one scan counts both: how many above, and how many level, up to each column
    counted = tl.cumsum((above << 16) | level, 1)
    level_seen = counted & 0xFFFF
    if LAST:
        level_seen = tl.maximum(level_seen - (count(keys == threshold[:, None])[:, None] - room), 0)
        chosen = above | (level & (level_seen > 0).to(tl.int32))
    else:
        chosen = above | (level & (level_seen <= room).to(tl.int32))
        level_seen = tl.minimum(level_seen, room)
    place = (counted >> 16) + level_seen - 1
    tl.store(lists + first_place * wanted + place, columns, mask=(chosen & written) != 0)


@triton.jit(do_not_specialize=["blocks", "critical", "skipped"])
def select_kernel(
    query_means, key_means, kept, dropped,
    blocks, critical, skipped,
    D: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, HAS_SKIPPED: tl.constexpr,
):  # fmt: skip
    """The `critical` best key blocks of STEP query blocks, and the `skipped` worst, ascending; WIDTH >= blocks."""
    i_bh = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * STEP + tl.arange(0, STEP)
    columns = tl.arange(0, WIDTH)
    within_q, within_k = rows < blocks, columns < blocks
    # a scalar and fixed distances: addresses are one register and constants
    start_q = query_means + i_bh * D * blocks
    start_k = key_means + i_bh * D * blocks
    scores = tl.zeros([STEP, WIDTH], dtype=tl.float32)
    UNROLL: tl.constexpr = 4 if WIDTH <= 2048 else 1  # loads in flight; wider rows have enough of them in one turn
    for _ in tl.range(0, D, loop_unroll_factor=UNROLL):
        b_q = tl.load(start_q + rows, mask=within_q, other=0.0)
        b_k = tl.load(start_k + columns, mask=within_k, other=0.0)
        scores += b_q[:, None] * b_k[None, :]
        start_q += blocks
        start_k += blocks
    keys = ordered(scores)
    inside = columns[None, :] < blocks
    first_place = (i_bh * blocks + rows)[:, None]
    indices = columns[None, :] + rows[:, None] * 0
    written = (rows < blocks).to(tl.int32)[:, None]
    write_best(kept, tl.where(inside, keys, LOWEST), critical, indices, first_place, written, STEP, WIDTH, False)
    if HAS_SKIPPED:
        # the worst are the best of the complements, which order the other way round
        write_best(
            dropped, tl.where(inside, ~keys, LOWEST), skipped, indices, first_place, written, STEP, WIDTH, True
        )  # fmt: skip
