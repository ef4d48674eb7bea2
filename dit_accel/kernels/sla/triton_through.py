"""The gradient of a row x through y = phi(x) T, some columns at a time: whole rows would be registers too many.

With U = g T^T for a gradient g [ROWS, D], the gradient of phi(x) is (U + a z) c for numbers a and c a row and z [D].
Columns are walked twice, and x is read again each time: for the sums over them, and for what is written. `width` is
BLOCK_D, unknown to the compiler, which would unroll the loops and hold the columns all the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_features import mapped_columns, pulled_columns
from dit_accel.kernels.sla.triton_rows import load_columns


@triton.jit
def columns_of(
    x, rows, valid, shift, size, b_g, table, peak, totals, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, phi(x), U and z of COLUMNS columns from `first` on; T is table * peak."""
    o_c = first + tl.arange(0, COLUMNS)
    o_d = tl.arange(0, BLOCK_D)
    b_x = load_columns(x, rows, valid, first, 0.0, D, COLUMNS).to(tl.float32)
    phi = mapped_columns(b_x, shift, size, (o_c < D)[None, :], MAP)
    # T^T [BLOCK_D, COLUMNS]
    b_t = tl.load(table + o_c[None, :] * D + o_d[:, None], mask=(o_d < D)[:, None] & (o_c < D)[None, :], other=0.0)
    b_u = tl.dot(b_g, b_t, input_precision=PRECISION) * peak
    return b_x, phi, b_u, tl.load(totals + o_c, mask=o_c < D, other=0.0)


@triton.jit
def sums_through(
    x, rows, valid, shift, size, b_g, table, peak, totals, width,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi . U and phi . z, and the same of phi rounded to the table's dtype: fp32 [ROWS] each."""
    with_u = tl.zeros([ROWS], dtype=tl.float32)
    with_z = tl.zeros([ROWS], dtype=tl.float32)
    rounded_with_u = tl.zeros([ROWS], dtype=tl.float32)
    rounded_with_z = tl.zeros([ROWS], dtype=tl.float32)
    for first in tl.range(0, width, COLUMNS, num_stages=1):
        _, phi, b_u, b_z = columns_of(
            x, rows, valid, shift, size, b_g, table, peak, totals, first, D, BLOCK_D, COLUMNS, MAP, PRECISION
        )  # fmt: skip
        rounded = phi.to(table.dtype.element_ty).to(tl.float32)
        with_u += tl.sum(phi * b_u, 1)
        with_z += tl.sum(phi * b_z[None, :], 1)
        rounded_with_u += tl.sum(rounded * b_u, 1)
        rounded_with_z += tl.sum(rounded * b_z[None, :], 1)
    return with_u, with_z, rounded_with_u, rounded_with_z


@triton.jit
def store_through(
    out, x, rows, valid, shift, size, b_g, table, peak, totals, sums, a, c, width, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dx into `out` [B, N, H, D]; sums: phi . U and phi . z."""
    i_bh = tl.program_id(1)
    with_u, with_z = sums
    of_row = (with_u + a * with_z) * c
    place = (((i_bh // heads).to(tl.int64) * tokens + rows) * heads + i_bh % heads) * D
    for first in tl.range(0, width, COLUMNS, num_stages=1):
        b_x, phi, b_u, b_z = columns_of(
            x, rows, valid, shift, size, b_g, table, peak, totals, first, D, BLOCK_D, COLUMNS, MAP, PRECISION
        )  # fmt: skip
        of_phi = (b_u + a[:, None] * b_z[None, :]) * c[:, None]
        o_c = first + tl.arange(0, COLUMNS)
        value = pulled_columns(of_phi, b_x, phi, of_row, MAP).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + o_c, value, mask=valid[:, None] & (o_c < D))
