"""Linear attention over marginal key blocks, backward: totals, less what critical and skipped blocks add to them.

With a = phi(q), b = phi(k), d a row's denominator with eps, M the marginal blocks of its query block, H and z the sums
of b^T v and of b over M: U = g H^T, r = a . U / d, da = (U - r z) / d; and over the query blocks to which a key block
is marginal dv = b G, db = v G^T - w with G = sum of a^T g / d, w = sum of a r / d. Query blocks that were summed one by
one in the forward pass (see `triton_marginal`) are left out of the totals and added one by one here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import head_of, locate
from dit_accel.kernels.sla.triton_features import mapped, pulled_back


@triton.jit
def with_keys(
    acc, keys, b_g, k, v, block, k_row, v_row, T, H, W, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (g v^T) phi(k) and keys + the sum of phi(k), over the tokens of one key block."""
    row, valid, _ = locate(block, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & inside
    b_k = tl.load(k + rows * (k_row * ALIGN) + o_d, mask=mask, other=0.0)
    b_v = tl.load(v + rows * (v_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi_k = tl.where(valid[:, None], mapped(b_k.to(tl.float32), inside, MAP), 0.0).to(b_v.dtype)
    products = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION).to(b_v.dtype)
    acc = tl.dot(products, phi_k, acc, input_precision=PRECISION)
    keys += tl.sum(phi_k.to(tl.float32), 0)
    return acc, keys


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row", "T", "H", "W", "heads", "tokens", "blocks", "n_kept", "n_dropped",
])  # fmt: skip
def marginal_dq_kernel(
    q, k, v, grad_out, table, peaks, totals, kept, dropped, modes, denominators, dq, inverses, ratios,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    T, H, W, heads, tokens, blocks, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D] of one query block; r, and 1 / d where the totals count the row, else 0, fp32 [B, H, N]."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)
    list_row = i_bh.to(tl.int64) * blocks + i_q
    kept += list_row * n_kept
    dropped += list_row * n_dropped
    one_by_one = tl.load(modes + list_row) != 0

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row, valid, _ = locate(i_q, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)
    mask = valid[:, None] & m_d
    b_q = tl.load(q + rows[:, None] * (q_row * ALIGN) + o_d, mask=mask, other=0.0)
    b_g = tl.load(grad_out + rows[:, None] * g_row + o_d, mask=mask, other=0.0).to(b_q.dtype)
    place = i_bh.to(tl.int64) * tokens + rows
    inverse = 1.0 / tl.load(denominators + place, mask=valid, other=1.0)

    acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    keys = tl.zeros([BLOCK_D], dtype=tl.float32)
    if one_by_one:
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
                acc, keys = with_keys(
                    acc, keys, b_g, k, v, block, k_row, v_row, T, H, W, m_d,
                    D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
                )  # fmt: skip
    else:
        for i in range(n_kept + n_dropped):
            entry = tl.where(i < n_kept, kept + i, dropped + (i - n_kept))
            acc, keys = with_keys(
                acc, keys, b_g, k, v, tl.load(entry), k_row, v_row, T, H, W, m_d,
                D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
            )  # fmt: skip
        p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
        b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(b_g, tl.trans(b_t), input_precision=PRECISION) * tl.load(peaks + i_bh) - acc
        keys = tl.load(totals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0) - keys
    x = b_q.to(tl.float32)
    phi = mapped(x, m_d, MAP)
    ratio = tl.sum(phi * acc, 1) * inverse
    of_phi = (acc - ratio[:, None] * keys[None, :]) * inverse[:, None]
    p_dq = dq + ((i_b.to(tl.int64) * tokens + rows[:, None]) * heads + i_h) * D + o_d
    tl.store(p_dq, pulled_back(of_phi, x, phi, MAP).to(dq.dtype.element_ty), mask=mask)
    tl.store(inverses + place, tl.where(one_by_one, 0.0, inverse), mask=valid)
    tl.store(ratios + place, ratio, mask=valid)


@triton.jit
def with_queries(
    of_v, of_k, weights, phi_k, b_v, sign, q, grad_out, denominators, ratios, block, q_row, g_row, T, H, W, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sign times what one query block adds to (b a^T / d) g, to (v g^T / d) a, and to the sum of a r / d."""
    row, valid, _ = locate(block, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & inside
    b_q = tl.load(q + rows[:, None] * (q_row * ALIGN) + o_d, mask=mask, other=0.0)
    b_g = tl.load(grad_out + rows[:, None] * g_row + o_d, mask=mask, other=0.0).to(b_q.dtype)
    denominator = tl.load(denominators + rows, mask=valid, other=1.0)
    ratio = tl.load(ratios + rows, mask=valid, other=0.0)
    phi = tl.where(valid[:, None], mapped(b_q.to(tl.float32), inside, MAP), 0.0)
    # 1 / d is shared between both factors of each product, so that neither leaves the range of half precision
    share = 1.0 / tl.sqrt(denominator)
    scaled = (phi * share[:, None]).to(b_q.dtype)
    share = share * sign
    products = tl.dot(phi_k, tl.trans(scaled), input_precision=PRECISION) * share[None, :]
    of_v = tl.dot(products.to(b_g.dtype), b_g, of_v, input_precision=PRECISION)
    products = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) * share[None, :]
    of_k = tl.dot(products.to(scaled.dtype), scaled, of_k, input_precision=PRECISION)
    weights += tl.sum(scaled.to(tl.float32) * (ratio * share)[:, None], 0)
    return of_v, of_k, weights


@triton.jit
def listed(entries, n, block):
    """Whether a list holds a block: 1 or 0."""
    found = 0
    for first in range(0, n, 64):
        place = first + tl.arange(0, 64)
        entry = tl.load(entries + place, mask=place < n, other=-1)
        found = tl.maximum(found, tl.max((entry == block).to(tl.int32), 0))
    return found


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row", "T", "H", "W", "heads", "tokens", "blocks", "n_kept", "n_dropped",
])  # fmt: skip
def marginal_dkdv_kernel(
    q, k, v, grad_out, table, peaks, dtotals, kept, dropped, modes, entries, firsts, singles, n_singles,
    denominators, ratios, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    T, H, W, heads, tokens, blocks, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, N, H, D] of one key block. G is table * peak, -w is dtotals.

    The query blocks that keep or drop it are ``entries[firsts[row] : firsts[row + 1]]``; the first n_singles of
    `singles` [B, H, blocks] are those that were summed one by one.
    """
    i_k = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)
    denominators += i_bh.to(tl.int64) * tokens
    ratios += i_bh.to(tl.int64) * tokens
    first_list = i_bh.to(tl.int64) * blocks

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row, valid, _ = locate(i_k, tl.arange(0, BLOCK), 0, 0, 0, T, H, W, 0, 0, BLOCK, TILE_T, TILE_H, TILE_W)
    rows = row.to(tl.int64)[:, None]
    mask = valid[:, None] & m_d
    b_k = tl.load(k + rows * (k_row * ALIGN) + o_d, mask=mask, other=0.0)
    b_v = tl.load(v + rows * (v_row * ALIGN) + o_d, mask=mask, other=0.0)
    phi_k = mapped(b_k.to(tl.float32), m_d, MAP).to(b_k.dtype)
    of_v = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    of_k = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    weights = tl.zeros([BLOCK_D], dtype=tl.float32)

    p_first = firsts + i_bh.to(tl.int64) * (blocks + 1) + i_k
    for i in range(tl.load(p_first), tl.load(p_first + 1)):
        block = tl.load(entries + i)
        if tl.load(modes + first_list + block) == 0:
            of_v, of_k, weights = with_queries(
                of_v, of_k, weights, phi_k, b_v, 1.0, q, grad_out, denominators, ratios, block,
                q_row, g_row, T, H, W, m_d, D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
            )  # fmt: skip
    for i in range(tl.load(n_singles + i_bh)):
        block = tl.load(singles + first_list + i)
        list_row = first_list + block
        if listed(kept + list_row * n_kept, n_kept, i_k) + listed(dropped + list_row * n_dropped, n_dropped, i_k) == 0:
            of_v, of_k, weights = with_queries(
                of_v, of_k, weights, phi_k, b_v, -1.0, q, grad_out, denominators, ratios, block,
                q_row, g_row, T, H, W, m_d, D, BLOCK_D, ALIGN, BLOCK, TILE_T, TILE_H, TILE_W, MAP, PRECISION,
            )  # fmt: skip

    p_t = table + i_bh.to(tl.int64) * (D * D) + o_d[:, None] * D + o_d[None, :]
    b_t = tl.load(p_t, mask=m_d[:, None] & m_d[None, :], other=0.0)
    peak = tl.load(peaks + i_bh)
    place = ((i_b.to(tl.int64) * tokens + rows) * heads + i_h) * D + o_d
    of_v = tl.dot(phi_k, b_t, input_precision=PRECISION) * peak - of_v
    tl.store(dv + place, of_v.to(dv.dtype.element_ty), mask=mask)
    weights += tl.load(dtotals + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    of_k = tl.dot(b_v, tl.trans(b_t), input_precision=PRECISION) * peak - of_k + weights[None, :]
    x = b_k.to(tl.float32)
    tl.store(dk + place, pulled_back(of_k, x, mapped(x, m_d, MAP), MAP).to(dk.dtype.element_ty), mask=mask)
