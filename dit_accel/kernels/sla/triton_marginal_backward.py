"""Linear attention over marginal key blocks, backward: totals, less what critical and skipped blocks add to them.

With a = phi(q), b = phi(k), d a row's denominator with eps, M the marginal blocks of its query block, H and z the sums
of b^T v and of b over M: U = g H^T, r = a . U / d, da = (U - r z) / d; and over the query blocks to which a key block
is marginal dv = b G, db = v G^T - w with G = sum of a^T g / d, w = sum of a r / d. Query blocks that were summed one by
one in the forward pass (see `triton_marginal`) are left out of the totals and added one by one here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_features import mapped, pulled_back
from dit_accel.kernels.sla.triton_marginal import lists_of, over_listed, over_others
from dit_accel.kernels.sla.triton_rows import load_rows, load_table, load_total, rows_of, slots_of, store_rows


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
    STEP: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D] of one query block; r, and 1 / d where the totals count the row, else 0, fp32 [B, H, N]."""
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    i_bh = tl.program_id(1)
    grid = (T, H, W)
    keys = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    list_row, lists = lists_of(kept, dropped, blocks, n_kept, n_dropped)
    one_by_one = tl.load(modes + list_row) != 0

    rows, valid = slots_of(tl.program_id(0), 0, grid, CUT, BLOCK)
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_g = load_rows(rows_of(grad_out, (g_batch, g_head, g_row), heads, 1), rows, valid, D, BLOCK_D).to(b_q.dtype)
    acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    if one_by_one:
        acc, total = over_others(
            acc, total, b_g, keys, lists, grid, blocks, D, BLOCK_D, CUT, STEP, MAP, True, PRECISION
        )  # fmt: skip
    else:
        acc, total = over_listed(acc, total, b_g, keys, lists, grid, D, BLOCK_D, CUT, STEP, MAP, True, PRECISION)
        b_t = load_table(table, D, BLOCK_D)
        acc = tl.dot(b_g, tl.trans(b_t), input_precision=PRECISION) * tl.load(peaks + i_bh) - acc
        total = load_total(totals, D, BLOCK_D) - total
    place = i_bh.to(tl.int64) * tokens + rows
    inverse = 1.0 / tl.load(denominators + place, mask=valid, other=1.0)
    x = b_q.to(tl.float32)
    phi = mapped(x, D, MAP)
    ratio = tl.sum(phi * acc, 1) * inverse
    of_phi = (acc - ratio[:, None] * total[None, :]) * inverse[:, None]
    store_rows(dq, rows, valid, pulled_back(of_phi, x, phi, MAP), heads, tokens, D, BLOCK_D)
    tl.store(inverses + place, tl.where(one_by_one, 0.0, inverse), mask=valid)
    tl.store(ratios + place, ratio, mask=valid)


@triton.jit
def with_queries(
    of_v, of_k, weights, phi_k, b_v, sign, queries, factors, block, first, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sign times what STEP slots of a query block give to (b a^T / d) g, (v g^T / d) a and -sum of a r / d."""
    q, grad_out = queries
    denominators, ratios = factors
    rows, valid = slots_of(block, first, grid, CUT, STEP)
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(grad_out, rows, valid, D, BLOCK_D).to(b_q.dtype)
    denominator = tl.load(denominators + rows, mask=valid, other=1.0)
    ratio = tl.load(ratios + rows, mask=valid, other=0.0)
    # 1 / d is shared between both factors of each product, so that neither leaves the range of half precision
    share = 1.0 / tl.sqrt(denominator)
    scaled = (tl.where(valid[:, None], mapped(b_q, D, MAP), 0.0) * share[:, None]).to(b_q.dtype)
    share = share * sign
    products = tl.dot(phi_k, tl.trans(scaled), input_precision=PRECISION) * share[None, :]
    of_v = tl.dot(products.to(b_g.dtype), b_g, of_v, input_precision=PRECISION)
    products = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) * share[None, :]
    of_k = tl.dot(products.to(scaled.dtype), scaled, of_k, input_precision=PRECISION)
    weights -= tl.sum(scaled.to(tl.float32) * (ratio * share)[:, None], 0)
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
    ROWS: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, N, H, D] of ROWS rows of one key block. G is table * peak, -w is dtotals.

    The query blocks that keep or drop it are ``entries[firsts[row] : firsts[row + 1]]``; the first n_singles of
    `singles` [B, H, blocks] are those that were summed one by one. Query blocks are taken in steps of STEP rows.
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    STEPS: tl.constexpr = BLOCK // STEP
    PARTS: tl.constexpr = BLOCK // ROWS
    i_k = tl.program_id(0) // PARTS
    i_bh = tl.program_id(1)
    grid = (T, H, W)
    queries = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows_of(grad_out, (g_batch, g_head, g_row), heads, 1)
    first_row = i_bh.to(tl.int64) * tokens
    factors = (denominators + first_row, ratios + first_row)
    first_list = i_bh.to(tl.int64) * blocks

    rows, valid = slots_of(i_k, tl.program_id(0) % PARTS * ROWS, grid, CUT, ROWS)
    k = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    b_v = load_rows(rows_of(v, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    phi_k = mapped(load_rows(k, rows, valid, D, BLOCK_D), D, MAP).to(b_v.dtype)
    of_v = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    of_k = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    weights = load_total(dtotals, D, BLOCK_D)

    p_first = firsts + i_bh.to(tl.int64) * (blocks + 1) + i_k
    for i in range(tl.load(p_first) * STEPS, tl.load(p_first + 1) * STEPS):
        block = tl.load(entries + i // STEPS)
        if tl.load(modes + first_list + block) == 0:
            of_v, of_k, weights = with_queries(
                of_v, of_k, weights, phi_k, b_v, -1.0, queries, factors, block, i % STEPS * STEP, grid,
                D, BLOCK_D, CUT, STEP, MAP, PRECISION,
            )  # fmt: skip
    for i in range(tl.load(n_singles + i_bh)):
        block = tl.load(singles + first_list + i)
        list_row = first_list + block
        if listed(kept + list_row * n_kept, n_kept, i_k) + listed(dropped + list_row * n_dropped, n_dropped, i_k) == 0:
            for first in range(0, BLOCK, STEP):
                of_v, of_k, weights = with_queries(
                    of_v, of_k, weights, phi_k, b_v, 1.0, queries, factors, block, first, grid,
                    D, BLOCK_D, CUT, STEP, MAP, PRECISION,
                )  # fmt: skip

    b_t = load_table(table, D, BLOCK_D)
    peak = tl.load(peaks + i_bh)
    of_v += tl.dot(phi_k, b_t, input_precision=PRECISION) * peak
    store_rows(dv, rows, valid, of_v, heads, tokens, D, BLOCK_D)
    of_k += tl.dot(b_v, tl.trans(b_t), input_precision=PRECISION) * peak + weights[None, :]
    # k is read again: held all the while, it would be registers that are not there
    x = load_rows(k, rows, valid, D, BLOCK_D).to(tl.float32)
    store_rows(dk, rows, valid, pulled_back(of_k, x, mapped(x, D, MAP), MAP), heads, tokens, D, BLOCK_D)
