"""Linear attention over all keys, backward. Sums over tokens are made in splits, in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of
from dit_accel.kernels.sla.triton_features import EPS, mapped, pulled_back


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "g_batch", "g_head", "g_row", "heads", "tokens",
])  # fmt: skip
def apply_backward_kernel(
    q, grad_out, table, peaks, totals, dq, inverses, ratios,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D], and 1 / d and r in fp32 [B, H, N] for `sums_kernel`.

    With a = phi(q), P the state, z the total and d = a . z + eps: r = a . (g P^T) / d and da = (g P^T - r z) / d.
    """
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    rows = row.to(tl.int64)[:, None]
    mask = inside[:, None] & m_d
    p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
    b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
    b_z = tl.load(totals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    b_q = tl.load(q + rows * (q_row * ALIGN) + o_d, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(grad_out + rows * g_row + o_d, mask=mask, other=0.0).to(b_t.dtype)
    phi = mapped(b_q, m_d, MAP)
    rounded = phi.to(b_t.dtype).to(tl.float32)
    inverse = 1.0 / (tl.sum(rounded * b_z[None, :], 1) + EPS)
    of_phi = tl.dot(b_g, tl.trans(b_t), input_precision=PRECISION) * tl.load(peaks + i_bh)
    ratio = tl.sum(rounded * of_phi, 1) * inverse
    of_phi = (of_phi - ratio[:, None] * b_z[None, :]) * inverse[:, None]
    p_dq = dq + ((i_b.to(tl.int64) * tokens + rows) * heads + i_h) * D + o_d
    tl.store(p_dq, pulled_back(of_phi, b_q, phi, MAP).to(dq.dtype.element_ty), mask=mask)
    place = i_bh.to(tl.int64) * tokens + row
    tl.store(inverses + place, inverse, mask=inside)
    tl.store(ratios + place, ratio, mask=inside)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "g_batch", "g_head", "g_row", "heads", "tokens",
])  # fmt: skip
def sums_kernel(
    q, grad_out, inverses, ratios, dstates, dtotals, dbias,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over SPLIT tokens, in fp32: dP = sum of a^T g / d [.., D, D], dz = -sum of a r / d and the sum of g [.., D]."""
    i_split = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    dstate = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    dtotal = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = i_split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, tokens), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < tokens
        rows = row.to(tl.int64)[:, None]
        mask = inside[:, None] & m_d
        b_q = tl.load(q + rows * (q_row * ALIGN) + o_d, mask=mask, other=0.0)
        b_g = tl.load(grad_out + rows * g_row + o_d, mask=mask, other=0.0).to(tl.float32)
        place = i_bh.to(tl.int64) * tokens + row
        inverse = tl.load(inverses + place, mask=inside, other=0.0)
        ratio = tl.load(ratios + place, mask=inside, other=0.0)
        phi = mapped(b_q.to(tl.float32), m_d, MAP).to(b_q.dtype)
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
    place = i_bh.to(tl.int64) * tl.num_programs(0) + i_split
    p_s = dstates + place * (D * D) + o_d[:, None] * D + o_d[None, :]
    tl.store(p_s, dstate, mask=m_d[:, None] & m_d[None, :])
    tl.store(dtotals + place * D + o_d, dtotal, mask=m_d)
    tl.store(dbias + place * D + o_d, b_dbias, mask=m_d)


@triton.jit(do_not_specialize=["k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "tokens"])
def state_backward_kernel(
    k, v, table, peaks, dtotals, dk, dv,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, N, H, D] from d(state) = table * peak [D, D] a head and d(total): dv = b dS, db = v dS^T + dz."""
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row.to(tl.int64)[:, None]
    mask = (row < tokens)[:, None] & m_d
    p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
    b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
    b_dz = tl.load(dtotals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    peak = tl.load(peaks + i_bh)
    b_k = tl.load(k + rows * (k_row * ALIGN) + o_d, mask=mask, other=0.0).to(tl.float32)
    b_v = tl.load(v + rows * (v_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi = mapped(b_k, m_d, MAP)
    place = ((i_b.to(tl.int64) * tokens + rows) * heads + i_h) * D + o_d
    b_dv = tl.dot(phi.to(b_t.dtype), b_t, input_precision=PRECISION) * peak
    tl.store(dv + place, b_dv.to(dv.dtype.element_ty), mask=mask)
    of_phi = tl.dot(b_v, tl.trans(b_t), input_precision=PRECISION) * peak + b_dz[None, :]
    tl.store(dk + place, pulled_back(of_phi, b_k, phi, MAP).to(dk.dtype.element_ty), mask=mask)
