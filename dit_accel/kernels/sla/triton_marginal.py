"""Linear attention of every query block over its marginal key blocks, forward.

The state over all keys is subtracted by what the critical and skipped blocks add to it, made anew as
phi(q) phi(k)^T v: no D x D state a block. Where less than half of a row's total is left, the difference would have lost
its digits; such a query block sums its marginal blocks one by one instead. All terms of the denominator are positive,
so that its share tells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of, locate
from dit_accel.kernels.sla.triton_features import EPS, mapped


@triton.jit
def with_block(
    acc, seen, phi_q, k, v, block, k_row, v_row, T, H, W, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (phi(q) phi(k)^T) v and seen + its row sums, over the tokens of one key block."""
    row, valid, _ = locate(block, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & inside
    b_k = tl.load(k + rows * (k_row * ALIGN) + o_d, mask=mask, other=0.0)
    b_v = tl.load(v + rows * (v_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi_k = tl.where(valid[:, None], mapped(b_k.to(tl.float32), inside, MAP), 0.0).to(b_v.dtype)
    products = tl.dot(phi_q, tl.trans(phi_k), input_precision=PRECISION).to(b_v.dtype)
    seen += tl.sum(products.to(tl.float32), 1)
    acc = tl.dot(products, b_v, acc, input_precision=PRECISION)
    return acc, seen


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "T", "H", "W", "heads", "tokens", "blocks", "n_kept", "n_dropped",
])  # fmt: skip
def marginal_kernel(
    q, k, v, table, peaks, totals, kept, dropped, out, denominators, modes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    T, H, W, heads, tokens, blocks, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] and denominators with eps fp32 [B, H, N] of one query block of one head.

    modes: int32 [B, H, blocks], 1 where the marginal blocks were summed one by one.
    """
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    list_row = i_bh.to(tl.int64) * blocks + i_q
    kept += list_row * n_kept
    dropped += list_row * n_dropped

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row, valid, _ = locate(i_q, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)
    mask = valid[:, None] & m_d
    b_q = tl.load(q + rows[:, None] * (q_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi = mapped(b_q.to(tl.float32), m_d, MAP)
    # rows of phi are brought to the sum 1, so that products stay in the range of half precision
    size = tl.sum(phi, 1)
    size = tl.where(size > 0.0, size, 1.0)
    phi_q = (phi / size[:, None]).to(b_q.dtype)
    b_z = tl.load(totals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    whole = tl.sum(phi_q.to(tl.float32) * b_z[None, :], 1)

    excluded = n_kept + n_dropped
    one_by_one = 2 * excluded > blocks
    acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    seen = tl.zeros([BLOCK], dtype=tl.float32)
    if not one_by_one:
        for i in range(excluded):
            entry = tl.where(i < n_kept, kept + i, dropped + (i - n_kept))
            acc, seen = with_block(
                acc, seen, phi_q, k, v, tl.load(entry), k_row, v_row, T, H, W, m_d,
                D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
            )  # fmt: skip
        lost = valid & (2.0 * seen > whole)
        one_by_one = tl.max(lost.to(tl.int32), 0) > 0
    if one_by_one:
        acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        seen = tl.zeros([BLOCK], dtype=tl.float32)
        # both lists ascend: walk them along with the blocks
        i_kept = 0
        i_dropped = 0
        for block in range(blocks):
            next_kept = tl.load(kept + i_kept, mask=i_kept < n_kept, other=-1)
            next_dropped = tl.load(dropped + i_dropped, mask=i_dropped < n_dropped, other=-1)
            if next_kept == block:
                i_kept += 1
            elif next_dropped == block:
                i_dropped += 1
            else:
                acc, seen = with_block(
                    acc, seen, phi_q, k, v, block, k_row, v_row, T, H, W, m_d,
                    D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
                )  # fmt: skip
    else:
        p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
        b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(phi_q, b_t, input_precision=PRECISION) * tl.load(peaks + i_bh) - acc
        seen = tl.maximum(whole - seen, 0.0)
    denominator = seen + EPS / size
    p_o = out + ((i_b.to(tl.int64) * tokens + rows[:, None]) * heads + i_h) * D + o_d
    tl.store(p_o, (acc * (1.0 / denominator)[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(denominators + i_bh.to(tl.int64) * tokens + rows, denominator * size, mask=valid)
    tl.store(modes + list_row, tl.where(one_by_one, 1, 0))
