"""Linear attention over all keys, backward. Sums over tokens are made in splits, in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_features import EPS, mapped, pulled_back
from dit_accel.kernels.sla.triton_rows import load_rows, load_table, load_total, rows_of, store_rows, store_sums


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "g_batch", "g_head", "g_row", "heads", "tokens",
])  # fmt: skip
def apply_backward_kernel(
    q, grad_out, table, peaks, totals, dq, inverses, ratios,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D], and 1 / d and r in fp32 [B, H, N] for `sums_kernel`.

    With a = phi(q), P the state, z the total and d = a . z + eps: r = a . (g P^T) / d and da = (g P^T - r z) / d.
    """
    i_bh = tl.program_id(1)
    rows = tl.program_id(0) * STEP + tl.arange(0, STEP)
    valid = rows < tokens
    b_t = load_table(table, D, BLOCK_D)
    b_z = load_total(totals, D, BLOCK_D)
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D).to(tl.float32)
    b_g = load_rows(rows_of(grad_out, (g_batch, g_head, g_row), heads, 1), rows, valid, D, BLOCK_D).to(b_t.dtype)
    phi = mapped(b_q, D, MAP)
    rounded = phi.to(b_t.dtype).to(tl.float32)
    inverse = 1.0 / (tl.sum(rounded * b_z[None, :], 1) + EPS)
    of_phi = tl.dot(b_g, tl.trans(b_t), input_precision=PRECISION) * tl.load(peaks + i_bh)
    ratio = tl.sum(rounded * of_phi, 1) * inverse
    of_phi = (of_phi - ratio[:, None] * b_z[None, :]) * inverse[:, None]
    store_rows(dq, rows, valid, pulled_back(of_phi, b_q, phi, MAP), heads, tokens, D, BLOCK_D)
    place = i_bh.to(tl.int64) * tokens + rows
    tl.store(inverses + place, inverse, mask=valid)
    tl.store(ratios + place, ratio, mask=valid)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "g_batch", "g_head", "g_row", "heads", "tokens",
])  # fmt: skip
def sums_kernel(
    q, grad_out, inverses, ratios, dstates, dtotals, dbias,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over SPLIT tokens, in fp32: dP = sum of a^T g / d [.., D, D], dz = -sum of a r / d and the sum of g [.., D]."""
    q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    grad_out = rows_of(grad_out, (g_batch, g_head, g_row), heads, 1)
    first_place = tl.program_id(1).to(tl.int64) * tokens
    dstate = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    dtotal = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = tl.program_id(0) * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, tokens), STEP):
        rows = start + tl.arange(0, STEP)
        valid = rows < tokens
        b_q = load_rows(q, rows, valid, D, BLOCK_D)
        b_g = load_rows(grad_out, rows, valid, D, BLOCK_D).to(tl.float32)
        inverse = tl.load(inverses + first_place + rows, mask=valid, other=0.0)
        ratio = tl.load(ratios + first_place + rows, mask=valid, other=0.0)
        phi = mapped(b_q, D, MAP).to(b_q.dtype)
        dtotal -= tl.sum(phi.to(tl.float32) * (ratio * inverse)[:, None], 0)
        b_dbias += tl.sum(b_g, 0)
        shares = b_g * inverse[:, None]
        if b_q.dtype == tl.float16:
            # g / d may be beyond the range of half precision: bring the tile's largest to 1
            largest = tl.max(tl.max(tl.abs(shares), 1), 0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            shares = (shares * (1.0 / largest)).to(b_q.dtype)
            dstate += tl.dot(tl.trans(phi), shares, input_precision=PRECISION) * largest
        else:
            dstate = tl.dot(tl.trans(phi), shares.to(b_q.dtype), dstate, input_precision=PRECISION)
    store_sums(dstates, dtotals, dstate, dtotal, D, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dbias + place * D + o_d, b_dbias, mask=o_d < D)


@triton.jit(do_not_specialize=["k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "tokens"])
def state_backward_kernel(
    k, v, table, peaks, dtotals, dk, dv,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, N, H, D] from d(state) = table * peak [D, D] a head and d(total): dv = b dS, db = v dS^T + dz."""
    rows = tl.program_id(0) * STEP + tl.arange(0, STEP)
    valid = rows < tokens
    b_t = load_table(table, D, BLOCK_D)
    peak = tl.load(peaks + tl.program_id(1))
    b_k = load_rows(rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows, valid, D, BLOCK_D).to(tl.float32)
    b_v = load_rows(rows_of(v, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    phi = mapped(b_k, D, MAP)
    of_v = tl.dot(phi.to(b_t.dtype), b_t, input_precision=PRECISION) * peak
    store_rows(dv, rows, valid, of_v, heads, tokens, D, BLOCK_D)
    of_phi = tl.dot(b_v, tl.trans(b_t), input_precision=PRECISION) * peak + load_total(dtotals, D, BLOCK_D)[None, :]
    store_rows(dk, rows, valid, pulled_back(of_phi, b_k, phi, MAP), heads, tokens, D, BLOCK_D)
