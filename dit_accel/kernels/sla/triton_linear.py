"""Linear attention over all keys, forward: a state per head, summed in splits, and its application to the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of
from dit_accel.kernels.sla.triton_features import EPS, mapped


@triton.jit(do_not_specialize=["k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "heads", "tokens"])
def state_kernel(
    k, v, states, totals,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(k)^T v fp32 [B, H, splits, D, D] and the sum of phi(k) fp32 [B, H, splits, D] over SPLIT tokens."""
    i_split = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    state = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = i_split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, tokens), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < tokens
        rows = row.to(tl.int64)[:, None]
        mask = inside[:, None] & m_d
        b_k = tl.load(k + rows * (k_row * ALIGN) + o_d, mask=mask, other=0.0)
        b_v = tl.load(v + rows * (v_row * ALIGN) + o_d, mask=mask, other=0.0)
        phi = tl.where(inside[:, None], mapped(b_k.to(tl.float32), m_d, MAP), 0.0).to(b_v.dtype)
        state = tl.dot(tl.trans(phi), b_v, state, input_precision=PRECISION)
        total += tl.sum(phi.to(tl.float32), 0)
    place = i_bh.to(tl.int64) * tl.num_programs(0) + i_split
    p_s = states + place * (D * D) + o_d[:, None] * D + o_d[None, :]
    tl.store(p_s, state, mask=m_d[:, None] & m_d[None, :])
    tl.store(totals + place * D + o_d, total, mask=m_d)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "e_batch", "e_head", "e_row", "heads", "tokens",
])  # fmt: skip
def apply_kernel(
    q, exact, table, peaks, totals, bias, out,
    q_batch, q_head, q_row, e_batch, e_head, e_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    MAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exact + phi(q) state / (phi(q) . total + eps) + bias, [B, N, H, D]; the state is table * peak, [D, D] a head."""
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    exact = head_of(exact, i_b, i_h, e_batch, e_head, 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row.to(tl.int64)[:, None]
    mask = (row < tokens)[:, None] & m_d
    p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
    b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
    b_z = tl.load(totals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    b_q = tl.load(q + rows * (q_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi = mapped(b_q.to(tl.float32), m_d, MAP).to(b_t.dtype)
    denominator = tl.sum(phi.to(tl.float32) * b_z[None, :], 1) + EPS
    result = tl.dot(phi, b_t, input_precision=PRECISION) * (tl.load(peaks + i_bh) / denominator)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + o_d, mask=m_d, other=0.0)[None, :]
    result += tl.load(exact + rows * e_row + o_d, mask=mask, other=0.0).to(tl.float32)
    p_o = out + ((i_b.to(tl.int64) * tokens + rows) * heads + i_h) * D + o_d
    tl.store(p_o, result.to(out.dtype.element_ty), mask=mask)
