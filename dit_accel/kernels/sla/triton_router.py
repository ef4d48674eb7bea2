"""The router's kernels: block means in one pass over q and over k, then a selection by bisection, row by row.

A program holds the scores of a few query blocks in registers as integers that order as the scores do. It finds the
threshold bit by bit and writes the lists: no blocks x blocks map in memory, no sort, no wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of, locate

UNIT = tl.constexpr(16)  # rows of means are padded to a multiple of this, so that they load 16 bytes at a time
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["x_batch", "x_head", "x_row", "T", "H", "W", "heads", "units"])
def block_means_kernel(
    x, means,
    x_batch, x_head, x_row, T, H, W, heads, units,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Mean of the tokens of one block, into column `block` of means: fp32 [B, H, D, units * UNIT]."""
    block = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    x = head_of(x, i_b, i_h, x_batch, x_head, ALIGN)
    row, valid, _ = locate(block, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    o_d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (o_d < D)
    b_x = tl.load(x + row.to(tl.int64)[:, None] * (x_row * ALIGN) + o_d, mask=mask, other=0.0)
    total = tl.sum(b_x.to(tl.float32), 0)
    held = tl.sum(valid.to(tl.float32), 0)
    place = (i_bh.to(tl.int64) * D + o_d) * (units * UNIT) + block
    tl.store(means + place, tl.div_rn(total, total * 0.0 + held), mask=o_d < D)


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


@triton.jit(do_not_specialize=["blocks", "units", "critical", "skipped"])
def select_kernel(
    query_means, key_means, kept, dropped,
    blocks, units, critical, skipped,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_SKIPPED: tl.constexpr,
):  # fmt: skip
    """The `critical` best key blocks of ROWS query blocks, and the `skipped` worst, ascending; WIDTH >= blocks."""
    i_bh = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    stride = units * UNIT
    p_q = query_means + i_bh * D * stride + rows
    p_k = key_means + i_bh * D * stride + columns
    within_q, within_k = rows < stride, columns < stride
    scores = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for _ in range(D):
        b_q = tl.load(p_q, mask=within_q, other=0.0)
        b_k = tl.load(p_k, mask=within_k, other=0.0)
        scores += b_q[:, None] * b_k[None, :]
        p_q += stride
        p_k += stride
    keys = ordered(scores)
    inside = columns[None, :] < blocks
    first_place = (i_bh * blocks + rows)[:, None]
    indices = columns[None, :] + rows[:, None] * 0
    written = (rows < blocks).to(tl.int32)[:, None]

    keys = tl.where(inside, keys, LOWEST)
    # the largest threshold that `critical` keys reach, from its highest bit on
    threshold = tl.full([ROWS], LOWEST, tl.int32)
    for bit in range(32):
        higher = threshold ^ (tl.full([ROWS], 1, tl.int32) << (31 - bit))
        reached = count(keys >= higher[:, None])
        threshold = tl.where(reached >= critical, higher, threshold)
    above = (keys > threshold[:, None]).to(tl.int32)
    level = (keys == threshold[:, None]).to(tl.int32)
    room = (critical - count(keys > threshold[:, None]))[:, None]
    # one scan counts both: how many above, and how many level, up to each column
    counted = tl.cumsum((above << 16) | level, 1)
    level_seen = counted & 0xFFFF
    chosen = above | (level & (level_seen <= room).to(tl.int32))
    place = (counted >> 16) + tl.minimum(level_seen, room) - 1
    tl.store(kept + first_place * critical + place, indices, mask=(chosen & written) != 0)

    if HAS_SKIPPED:
        keys = tl.where(inside, keys, HIGHEST)
        # the largest threshold below which there are fewer than `skipped` keys
        threshold = tl.full([ROWS], LOWEST, tl.int32)
        for bit in range(32):
            higher = threshold ^ (tl.full([ROWS], 1, tl.int32) << (31 - bit))
            under = count(keys < higher[:, None])
            threshold = tl.where(under < skipped, higher, threshold)
        below = (keys < threshold[:, None]).to(tl.int32)
        level = (keys == threshold[:, None]).to(tl.int32)
        room = (skipped - count(keys < threshold[:, None]))[:, None]
        left_out = count(keys == threshold[:, None])[:, None] - room  # of equal ones the last are dropped
        counted = tl.cumsum((below << 16) | level, 1)
        level_seen = counted & 0xFFFF
        chosen = below | (level & (level_seen > left_out).to(tl.int32))
        place = (counted >> 16) + tl.maximum(level_seen - left_out, 0) - 1
        tl.store(dropped + first_place * skipped + place, indices, mask=(chosen & written) != 0)
