"""What the kernels of the linear branch read and write: a head's table, sums over splits of the tokens, rows anew.

A head and its rows are as in `block_sparse.triton_tokens`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import locate, rows_written


@triton.jit
def behind(x, rows):
    """The same head from a later row on."""
    start, distance = x
    return start + rows.to(tl.int64) * distance, distance


@triton.jit
def stored_rows(x, rows, valid, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What this program put into x by `store_rows`, fp32."""
    tl.debug_barrier()  # what one thread stored may be another's to load
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)
    return tl.load(rows_written(x, rows, heads, tokens, D, BLOCK_D), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(x, rows, valid, first, other, D: tl.constexpr, PART: tl.constexpr):
    """PART columns, from `first` on, of rows of one head: [ROWS, PART]; `other` where not valid, and beyond D."""
    start, distance = x
    o_d = first + tl.arange(0, PART)
    mask = valid[:, None] & (o_d < D)
    return tl.load(start + rows.to(tl.int64)[:, None] * distance + o_d, mask=mask, other=other)


@triton.jit
def table_of(table, D: tl.constexpr):
    """This program's head of tables [B, H, D, D]."""
    return table + tl.program_id(1).to(tl.int64) * (D * D)


@triton.jit
def load_part(table, first, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, TURNED: tl.constexpr):
    """PART rows, from `first` on, of a table [D, D], or of its transpose if TURNED: [PART, BLOCK_D], 0 beyond D."""
    row = first + tl.arange(0, PART)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    place = column * D + row if TURNED else row * D + column
    return tl.load(table + place, mask=(row < D) & (column < D), other=0.0)


@triton.jit
def halves(x):
    """The left and the right half of the columns."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def times_table(x, table, acc, D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x T [ROWS, BLOCK_D] for a table [D, D]; TURNED: x T^T.

    In halves: where products are `mma.sync`, a warp holds in registers what it multiplies by.
    """
    HALF: tl.constexpr = BLOCK_D // 2
    if HALF < 16:
        acc = tl.dot(x, load_part(table, 0, D, BLOCK_D, BLOCK_D, TURNED), acc, input_precision=PRECISION)
    else:
        left, right = halves(x)
        acc = tl.dot(left, load_part(table, 0, D, BLOCK_D, HALF, TURNED), acc, input_precision=PRECISION)
        acc = tl.dot(right, load_part(table, HALF, D, BLOCK_D, HALF, TURNED), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_total(totals, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's head of totals [B, H, D] as [BLOCK_D], 0 beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(totals + tl.program_id(1).to(tl.int64) * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_sums(tables, totals, table, total, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What this program summed over its split, into fp32 [B, H, splits, D, D] and [B, H, splits, D]."""
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_table = tables + place * (D * D) + o_d[:, None] * D + o_d[None, :]
    tl.store(p_table, table, mask=(o_d < D)[:, None] & (o_d < D)[None, :])
    tl.store(totals + place * D + o_d, total, mask=o_d < D)


@triton.jit
def slots_of(block, first, grid, CUT: tl.constexpr, STEP: tl.constexpr):
    """Row and validity of STEP slots of a block from slot `first` on. CUT: block and tile, as `layout.Cut` packs it."""
    T, H, W = grid
    row, valid, _ = locate(
        block, first + tl.arange(0, STEP), 0, 0, 0, T, H, W, 0, 0, CUT[0], CUT[1], CUT[2], CUT[3]
    )  # fmt: skip
    return row, valid


@triton.jit
def hidden_zero(counts):
    """0, which the compiler does not know for one; counts: a pointer to a number that is not negative.

    What is worked out from it is worked out anew. Held since it was first wanted, it would be registers too many.
    """
    return tl.minimum(tl.load(counts, volatile=True), 0)


@triton.jit
def placed(counts, grid, CUT: tl.constexpr):
    """A `hidden_zero`; this program's head, the rows of its query block and which are valid, worked out anew."""
    zero = hidden_zero(counts)
    rows, valid = slots_of(tl.program_id(0) + zero, 0, grid, CUT, CUT[0])
    return zero, tl.program_id(1) + zero, rows, valid


@triton.jit
def placed_keys(counts, text_lens, starts, grid, conditioning, text, heads, CUT: tl.constexpr, ROWS: tl.constexpr):
    """This program's head and ROWS rows of its key block, worked out anew: which are tokens, and which are keys."""
    PARTS: tl.constexpr = CUT[0] // ROWS
    visual_start, conditioning_start, text_start = starts
    T, H, W = grid
    zero = hidden_zero(counts)
    program, i_bh = tl.program_id(0) + zero, tl.program_id(1) + zero
    rows, there, _raster = locate(
        program // PARTS, program % PARTS * ROWS + tl.arange(0, ROWS), visual_start, conditioning_start, text_start,
        T, H, W, conditioning, text, CUT[0], CUT[1], CUT[2], CUT[3],
    )  # fmt: skip
    # text behind its valid length is no key
    behind_text = (rows >= text_start + tl.load(text_lens + i_bh // heads)) & (rows < text_start + text)
    return i_bh, rows, there, there & (behind_text == 0)
