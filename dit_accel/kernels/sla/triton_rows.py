"""What the kernels of the linear branch read and write: rows of a head, a head's table, sums over splits of the tokens.

A program's second number is its head, counted over all samples. `x` of one head is a pair: where its rows begin, and
the distance from row to row in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of, locate


@triton.jit
def rows_of(x, strides, heads, ALIGN: tl.constexpr):
    """This program's head of x [B, H, N, D], whose strides (batch, head, row) come divided by ALIGN."""
    i_bh = tl.program_id(1)
    batch, head, row = strides
    return head_of(x, i_bh // heads, i_bh % heads, batch, head, ALIGN), row * ALIGN


@triton.jit
def load_rows(x, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [ROWS, BLOCK_D]; 0 where they are not valid, and beyond D."""
    start, distance = x
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(start + rows.to(tl.int64)[:, None] * distance + o_d, mask=valid[:, None] & (o_d < D), other=0.0)


@triton.jit
def store_rows(x, rows, valid, values, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of this program's head of x [B, N, H, D]."""
    i_bh = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    place = ((i_bh // heads).to(tl.int64) * tokens + rows[:, None]) * heads + i_bh % heads
    tl.store(x + place * D + o_d, values.to(x.dtype.element_ty), mask=valid[:, None] & (o_d < D))


@triton.jit
def load_table(table, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's head of table [B, H, D, D] as [BLOCK_D, BLOCK_D], 0 beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
    return tl.load(table + place, mask=(o_d < D)[:, None] & (o_d < D)[None, :], other=0.0)


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
