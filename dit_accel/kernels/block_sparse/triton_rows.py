"""Rows of one head in memory, read and written by every kernel that attends.

A program's second number is its head, counted over all samples. `x` of one head is a pair: where its rows begin, and
the distance from row to row in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_head(x, i_bh, strides, heads, ALIGN: tl.constexpr):
    """One head of x [B, H, N, D], whose strides (batch, head, row) come divided by ALIGN."""
    batch, head, row = strides
    start = x + ((i_bh // heads).to(tl.int64) * batch + (i_bh % heads).to(tl.int64) * head) * ALIGN
    return start, row * ALIGN


@triton.jit
def rows_of(x, strides, heads, ALIGN: tl.constexpr):
    """This program's head of x."""
    return rows_of_head(x, tl.program_id(1), strides, heads, ALIGN)


@triton.jit
def load_rows(x, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [ROWS, BLOCK_D]; 0 where they are not valid, and beyond D."""
    start, distance = x
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(start + rows.to(tl.int64)[:, None] * distance + o_d, mask=valid[:, None] & (o_d < D), other=0.0)


@triton.jit
def rows_written(x, rows, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows of this program's head of x [B, N, H, D]."""
    i_bh = tl.program_id(1)
    place = ((i_bh // heads).to(tl.int64) * tokens + rows[:, None]) * heads + i_bh % heads
    return x + place * D + tl.arange(0, BLOCK_D)


@triton.jit
def store_rows(x, rows, valid, values, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of this program's head of x [B, N, H, D]."""
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)
    tl.store(rows_written(x, rows, heads, tokens, D, BLOCK_D), values.to(x.dtype.element_ty), mask=mask)
