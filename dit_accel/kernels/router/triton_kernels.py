"""The router's kernels: means of cells, scores of all pairs of blocks, and the lists of one row a program.

A row's scores are held in registers as integers in the order of the scores. Levels are found bit by bit. Nothing is
sorted, and nothing waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import load_rows, rows_of, visual_slots
from dit_accel.kernels.jit import kernel

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
SHORTEST = tl.constexpr(1e-12)  # of a token's length, as `torch.nn.functional.normalize` has it


@kernel
def cell_means_kernel(
    means, x, side, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    CELL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Mean of one cell's tokens, of their unit vectors if UNIT: fp32 [B, H, cells, D], 0 for a cell without tokens."""
    cell = tl.program_id(0)
    slots = cell % (BLOCK // CELL) * CELL + tl.arange(0, CELL)
    rows, valid, _raster = visual_slots(cell // (BLOCK // CELL), slots, side, BLOCK, TILE)
    b_x = load_rows(rows_of(x, heads, ALIGN), rows, valid, D, BLOCK_D).to(tl.float32)
    if UNIT:
        b_x = b_x / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), SHORTEST)[:, None]
    held = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
    total = tl.sum(b_x, 0)
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + cell) * D + o_d
    tl.store(means + place, tl.div_rn(total, total * 0.0 + held), mask=o_d < D)


@kernel
def deviations_kernel(
    means, deviations, x, side, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Mean and mean absolute deviation of a block's tokens, fp32 [B, H, blocks, D]; PART tokens are read at a time."""
    block = tl.program_id(0)
    rows_of_head = rows_of(x, heads, ALIGN)
    total = tl.zeros([BLOCK_D], tl.float32)
    held = 0.0
    for first in tl.range(0, BLOCK, PART):
        rows, valid, _raster = visual_slots(block, first + tl.arange(0, PART), side, BLOCK, TILE)
        total += tl.sum(load_rows(rows_of_head, rows, valid, D, BLOCK_D).to(tl.float32), 0)
        held += tl.sum(valid.to(tl.float32), 0)
    mean = tl.div_rn(total, total * 0.0 + held)
    gaps = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, BLOCK, PART):  # the block lies in the cache now
        rows, valid, _raster = visual_slots(block, first + tl.arange(0, PART), side, BLOCK, TILE)
        b_x = load_rows(rows_of_head, rows, valid, D, BLOCK_D).to(tl.float32)
        gaps += tl.sum(tl.where(valid[:, None], tl.abs(b_x - mean[None, :]), 0.0), 0)
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * D + o_d
    tl.store(means + place, mean, mask=o_d < D)
    tl.store(deviations + place, tl.div_rn(gaps, gaps * 0.0 + held), mask=o_d < D)


@triton.jit
def load_means(
    means, first, cell, first_d, blocks, D: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr
):
    """PART dimensions of one cell of ROWS blocks of this program's head, [ROWS, PART]; 0 beyond both ends."""
    row = first + tl.arange(0, ROWS)[:, None]
    o_d = first_d + tl.arange(0, PART)[None, :]
    place = ((tl.program_id(1).to(tl.int64) * blocks + row) * CELLS + cell) * D + o_d
    return tl.load(means + place, mask=(row < blocks) & (o_d < D), other=0.0)


@triton.jit
def products(
    query_means, key_means, row, column, a, b, query_blocks, key_blocks,
    D: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Products of cell a of ROWS query blocks with cell b of COLUMNS key blocks, [ROWS, COLUMNS], fp32."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first_d in tl.range(0, D, PART):  # whole rows of D do not fit the registers
        b_q = load_means(query_means, row, a, first_d, query_blocks, D, CELLS, ROWS, PART)
        b_k = load_means(key_means, column, b, first_d, key_blocks, D, CELLS, COLUMNS, PART)
        acc = tl.dot(b_q, tl.trans(b_k), acc, input_precision="ieee")
    return acc


@kernel
def scores_kernel(
    query_means, key_means, query_sizes, key_sizes, scores, scale, query_blocks, key_blocks,
    D: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Scores fp32 [B, H, query blocks, key blocks]: products of means, or with cells the log of a sum over their pairs.

    Sizes: int32 [blocks, CELLS], the tokens of each cell.
    """
    strips = tl.cdiv(key_blocks, COLUMNS)
    row = tl.program_id(0) // strips * ROWS
    column = tl.program_id(0) % strips * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    if CELLS == 1:
        logits = products(
            query_means, key_means, row, column, 0, 0, query_blocks, key_blocks, D, CELLS, ROWS, COLUMNS, PART
        )
    else:
        highest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for pair in tl.range(0, CELLS * CELLS):
            a, b = pair // CELLS, pair % CELLS
            logit = products(
                query_means, key_means, row, column, a, b, query_blocks, key_blocks, D, CELLS, ROWS, COLUMNS, PART
            )
            held_q = tl.load(query_sizes + rows * CELLS + a, mask=rows < query_blocks, other=0) > 0
            held_k = tl.load(key_sizes + columns * CELLS + b, mask=columns < key_blocks, other=0) > 0
            logit = tl.where(held_q[:, None] & held_k[None, :], logit * scale, float("-inf"))
            above = tl.maximum(highest, logit)
            base = tl.where(above == float("-inf"), 0.0, above)  # where no pair was seen yet
            total = total * tl.exp(highest - base) + tl.exp(logit - base)
            highest = above
        logits = tl.where((highest == float("-inf")) & (total == 0.0), highest, highest + tl.log(total))
    place = (tl.program_id(1).to(tl.int64) * query_blocks + rows[:, None]) * key_blocks + columns[None, :]
    tl.store(scores + place, logits, mask=(rows < query_blocks)[:, None] & (columns < key_blocks)[None, :])


@triton.jit
def best(keys, weights, target, LAST: tl.constexpr):
    """Whether each entry is among the fewest best whose weights reach `target`; all, if they do not reach it.

    The level of the last one is found bit by bit. Of equal keys the first count, or the last if LAST.
    """
    level = tl.full([], LOWEST, tl.int32)
    for step in tl.range(0, 32):
        tried = level ^ (tl.full([], 1, tl.int32) << (31 - step))
        reached = tl.sum(tl.where(keys >= tried, weights, 0), 0) >= target
        level = tl.where(reached, tried, level)
    missing = target - tl.sum(tl.where(keys > level, weights, 0), 0)
    room = tl.where(keys == level, weights, 0)
    return (keys > level) | ((keys == level) & (tl.cumsum(room, 0, reverse=LAST) - room < missing))


@kernel
def lists_kernel(
    scores, thresholds, wanted, shares, pooled, ranked, forced, indices, counts, worst,
    factor, blocks, query_blocks, width, skip,
    WIDTH: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_SHARE: tl.constexpr,
    HAS_GUARD: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The lists of one row: int32 [B, H, query blocks, width] and counts, and [B, H, query blocks, skip].

    See `rule.RouterArguments` for the parts.

    Args:
        scores: fp32 [B, H, query blocks, blocks].
        thresholds, wanted, shares, pooled: fp32, int32, fp32 and uint8 [B, H, query blocks].
        ranked: uint8 [B, H, blocks].
        forced: uint8 [query blocks, blocks].
        factor: makes logits of scores.
    """
    row = tl.program_id(1).to(tl.int64) * query_blocks + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    exists = columns < blocks
    score = tl.load(scores + row * blocks + columns, mask=exists, other=float("-inf"))
    score = tl.where(score == score, score, float("inf"))
    chosen = columns < 0
    if HAS_THRESHOLD:
        chosen = chosen | (score > tl.load(thresholds + row))
    if HAS_GUARD:
        alike = tl.load(ranked + tl.program_id(1).to(tl.int64) * blocks + columns, mask=exists, other=1) > 0
        score = tl.where(alike, score, float("-inf"))
        chosen = chosen | (alike == 0) | (tl.load(pooled + row) == 0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    keys = tl.where(exists, tl.where(bits < 0, bits ^ HIGHEST, bits), LOWEST)
    if HAS_COUNT:
        chosen = chosen | best(keys, exists.to(tl.int32), tl.load(wanted + row), False)
    if HAS_SHARE:
        top = tl.max(score, 0)
        mass = tl.where(exists, tl.where(score == top, 1.0, tl.exp(factor * (score - top))), 0.0)
        share = tl.load(shares + row)
        target = tl.where(share < 1.0, share * tl.sum(mass, 0), float("inf"))
        chosen = chosen | best(keys, mass, target, False)
    if HAS_FORCED:
        place = tl.program_id(0).to(tl.int64) * blocks + columns
        chosen = chosen | (tl.load(forced + place, mask=exists, other=0) > 0)
    chosen = chosen & exists
    nothing = tl.sum(chosen.to(tl.int32), 0) == 0
    chosen = chosen | (nothing & (columns == tl.argmax(keys, 0, tie_break_left=True)))
    marked = chosen.to(tl.int32)
    place = tl.cumsum(marked, 0) - marked
    tl.store(indices + row * width + place, columns, mask=marked > 0)
    tl.store(counts + row, tl.sum(marked, 0))
    if HAS_SKIP:
        from_last = tl.where(exists, ~keys, LOWEST)
        marked = (exists & best(from_last, exists.to(tl.int32), skip, True)).to(tl.int32)
        place = tl.cumsum(marked, 0) - marked
        tl.store(worst + row * skip + place, columns, mask=marked > 0)
