"""The backward kernels: dq over lists, the gradient of the state, dk and dv over transposed lists.

README.md in this folder has the equations. In scope "all" the table includes the projection, and g is the gradient of
the whole output. In scope "marginal" g is the gradient behind the projection; critical and negligible blocks are
subtracted from the sums over all blocks. Query blocks that the forward summed one by one have no part in the totals;
their terms are added one by one here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_backward import of_keys, of_queries, row_lse
from dit_accel.kernels.block_sparse.triton_tokens import RUNTIME, list_of, load_rows, rows_of, rows_of_head, store_rows
from dit_accel.kernels.sla.triton_linear import (
    EPS,
    behind,
    hidden_zero,
    load_columns,
    load_part,
    load_total,
    mapped,
    mapped_columns,
    over_listed,
    over_marginal,
    over_selecting,
    placed,
    placed_keys,
    pulled_back,
    pulled_columns,
    routed,
    scales_of_rows,
    slots_of,
    store_sums,
    stored_rows,
    table_of,
    times_table,
)


@triton.jit
def columns_of(
    x, rows, valid, shift, size, b_g, table, peak, totals, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, phi(x), U = g T^T and z of COLUMNS columns from `first` on; T is table * peak."""
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
    """phi . U and phi . z of each row, and both for phi rounded to the table's dtype: fp32 [ROWS] each.

    This and `store_through` walk the columns and read x each time; see `with_state` for the reason and `width`.
    """
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
    """Store dx to `out` [B, N, H, D], where dphi = (U + a z) c for numbers a and c a row; sums: phi . U and phi . z."""
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


@triton.jit(do_not_specialize=RUNTIME)
def sparse_linear_bwd_kernel_dq(
    q, k, v, grad_out, pulled, exact, lse, table, peaks, totals, critical, negligible, places, spans, text_lens,
    denominators, modes, dq, delta, inverses, ratios,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    p_batch, p_head, p_row, e_batch, e_head, e_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning,
    heads, tokens, query_blocks, blocks, dense, topk, skip,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D] of one query block of one head; arguments as in the forward kernel.

    Also stores, for dk and dv, fp32 [B, H, N]: delta = rowsum(exact * grad_out), r, and 1 / d. The last is 0 for rows
    that have no part in the totals. In scope "marginal", pulled [B, H, N, D] is the gradient behind the projection,
    grad_out W.
    """
    CUT_Q: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    i_bh = tl.program_id(1)
    grid = (T, H, W)
    q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    keys = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    values = rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    rows, valid = slots_of(tl.program_id(0), 0, grid, CUT_Q, BLOCK_Q)
    place = i_bh.to(tl.int64) * tokens + rows
    gradients = rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN)
    table = table_of(table, D)
    peak = tl.load(peaks + i_bh)
    # the linear branch's part waits in dq: its registers are needed for the exact branch
    if SCOPE == "all":
        totals += i_bh.to(tl.int64) * D
        width = BLOCK_D + hidden_zero(spans)
        COLUMNS: tl.constexpr = min(BLOCK_D, 32)
        b_g = load_rows(gradients, rows, valid, D, BLOCK_D).to(table.dtype.element_ty)
        shift, size = scales_of_rows(q, rows, valid, width, D, BLOCK_Q, COLUMNS, MAP)
        with_u, with_z, ratio, denominator = sums_through(
            q, rows, valid, shift, size, b_g, table, peak, totals, width, D, BLOCK_D, BLOCK_Q, COLUMNS, MAP, PRECISION
        )  # fmt: skip
        inverse = 1.0 / (denominator + EPS)
        ratio *= inverse
        tl.store(inverses + place, inverse, mask=valid)
        store_through(
            dq, q, rows, valid, shift, size, b_g, table, peak, totals, (with_u, with_z), -ratio, inverse, width,
            heads, tokens, D, BLOCK_D, COLUMNS, MAP, PRECISION,
        )  # fmt: skip
    else:
        b_q = load_rows(q, rows, valid, D, BLOCK_D)
        b_g = load_rows(rows_of(pulled, (p_batch, p_head, p_row), heads, ALIGN), rows, valid, D, BLOCK_D).to(b_q.dtype)
        lists = routed(critical, negligible, i_bh, tl.program_id(0), query_blocks, topk, skip)
        k_visual, v_visual = behind(keys, visual_start), behind(values, visual_start)
        one_by_one = tl.load(modes + i_bh * query_blocks + tl.program_id(0)) != 0
        of_phi = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        if one_by_one:
            of_phi, total = over_marginal(
                of_phi, total, b_g, k_visual, v_visual, lists, grid, blocks,
                D, BLOCK_D, CUT, STEP, MAP, True, PRECISION,
            )  # fmt: skip
        else:
            of_phi, total = over_listed(
                of_phi, total, b_g, k_visual, v_visual, lists, grid, D, BLOCK_D, CUT, STEP, MAP, True, PRECISION
            )  # fmt: skip
            of_phi = times_table(b_g, table, of_phi * (-1.0 / peak), D, BLOCK_D, True, PRECISION) * peak
            total = load_total(totals, D, BLOCK_D) - total
        x = load_rows(q, rows, valid, D, BLOCK_D).to(tl.float32)
        phi = mapped(x, D, MAP)
        inverse = 1.0 / tl.load(denominators + place, mask=valid, other=1.0)
        ratio = tl.sum(phi * of_phi, 1) * inverse
        tl.store(inverses + place, tl.where(one_by_one, 0.0, inverse), mask=valid)
        of_phi = (of_phi - ratio[:, None] * total[None, :]) * inverse[:, None]
        store_rows(dq, rows, valid, pulled_back(of_phi, x, phi, MAP), heads, tokens, D, BLOCK_D)
    tl.store(ratios + place, ratio, mask=valid)

    _, i_bh, rows, valid = placed(spans, grid, CUT_Q)
    place = i_bh.to(tl.int64) * tokens + rows
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(gradients, rows, valid, D, BLOCK_D)
    b_e = load_rows(rows_of(exact, (e_batch, e_head, e_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_delta = tl.sum(b_e.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(delta + place, b_delta, mask=valid)
    acc = of_queries(
        b_q, b_g.to(b_q.dtype), row_lse(lse, place, valid), b_delta, keys, values, scale,
        list_of(i_bh * query_blocks + tl.program_id(0), places, spans, topk + dense), spans,
        (visual_start, conditioning_start, text_start), grid, conditioning, tl.load(text_lens + i_bh // heads),
        D, BLOCK_D, BLOCK_Q, CUT, STEP, False, PRECISION,
    )  # fmt: skip
    _, _, rows, valid = placed(spans, grid, CUT_Q)
    acc = acc * scale + stored_rows(dq, rows, valid, heads, tokens, D, BLOCK_D)
    store_rows(dq, rows, valid, acc, heads, tokens, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def sparse_linear_bwd_kernel_dkdv(
    q, k, v, grad_out, pulled, lse, delta, table, peaks, dtotals, critical, negligible, text_lens,
    entries, query_places, firsts, negligible_entries, negligible_firsts,
    modes, singles, n_singles, denominators, ratios, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    p_batch, p_head, p_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning, text,
    heads, tokens, key_tokens, query_blocks, blocks, dense, topk, skip,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of ROWS rows of one key block. G is table * peak, -w is dtotals.

    The query blocks that attend to the key block exactly are listed as in `triton_lists.Transposed` (entries,
    query_places, firsts). In scope "marginal" the query blocks for which it is negligible are listed alike. The first
    n_singles of `singles` [B, H, query_blocks] are then the query blocks that were summed one by one. Conditioning and
    text blocks get nothing from the linear branch. Query blocks are processed in steps of STEP rows.
    """
    CUT_Q: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    PARTS: tl.constexpr = BLOCK_K // ROWS
    i_k = tl.program_id(0) // PARTS
    visual = i_k < blocks
    grid = (T, H, W)
    starts = (visual_start, conditioning_start, text_start)
    i_bh, rows, there, valid = placed_keys(firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS)
    b_v = load_rows(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
    first_row = i_bh.to(tl.int64) * tokens
    # the linear branch's part waits in dk and dv: its registers are needed for the exact branch
    if visual:
        table = table_of(table, D)
        peak = tl.load(peaks + i_bh)
        of_v = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        if SCOPE == "all":
            COLUMNS: tl.constexpr = min(BLOCK_D, 32)
            width = BLOCK_D + hidden_zero(firsts)
            dtotals += i_bh.to(tl.int64) * D
            shift, size = scales_of_rows(keys, rows, valid, width, D, ROWS, COLUMNS, MAP)
            for first in tl.range(0, width, COLUMNS, num_stages=1):
                inside = (first + tl.arange(0, COLUMNS) < D)[None, :]
                phi = mapped_columns(load_columns(keys, rows, valid, first, 0.0, D, COLUMNS), shift, size, inside, MAP)
                b_t = load_part(table, first, D, BLOCK_D, COLUMNS, False)
                of_v = tl.dot(phi.to(b_t.dtype), b_t, of_v, input_precision=PRECISION)
            store_rows(dv, rows, valid, of_v * peak, heads, key_tokens, D, BLOCK_D)
            one = tl.full([ROWS], 1.0, dtype=tl.float32)
            with_u, with_z, _with_u, _with_z = sums_through(
                keys, rows, valid, shift, size, b_v, table, peak, dtotals, width,
                D, BLOCK_D, ROWS, COLUMNS, MAP, PRECISION,
            )  # fmt: skip
            store_through(
                dk, keys, rows, valid, shift, size, b_v, table, peak, dtotals, (with_u, with_z), one, one, width,
                heads, key_tokens, D, BLOCK_D, COLUMNS, MAP, PRECISION,
            )  # fmt: skip
        else:
            total = load_total(dtotals, D, BLOCK_D)
            of_phi = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
            phi_k = mapped(load_rows(keys, rows, valid, D, BLOCK_D), D, MAP).to(b_v.dtype)
            of_v, of_phi, total = over_selecting(
                of_v, of_phi, total, phi_k, b_v, i_k, rows_of(q, (q_batch, q_head, q_row), heads, ALIGN),
                rows_of(pulled, (p_batch, p_head, p_row), heads, ALIGN),
                (denominators + first_row, ratios + first_row), (critical, negligible, topk, skip),
                (entries, firsts, negligible_entries, negligible_firsts), (modes, singles, n_singles), grid,
                query_blocks, (blocks, dense), D, BLOCK_D, CUT_Q, STEP, MAP, PRECISION,
            )  # fmt: skip
            i_bh, rows, there, valid = placed_keys(
                firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS
            )
            keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
            peak = tl.load(peaks + i_bh)
            of_v = times_table(phi_k, table, of_v * (1.0 / peak), D, BLOCK_D, False, PRECISION) * peak
            store_rows(dv, rows, valid, of_v, heads, key_tokens, D, BLOCK_D)
            of_phi = times_table(b_v, table, of_phi * (1.0 / peak), D, BLOCK_D, True, PRECISION) * peak + total[None, :]
            # k is loaded again to shorten its live range; otherwise the kernel spills
            x = load_rows(keys, rows, valid, D, BLOCK_D).to(tl.float32)
            dx = pulled_back(of_phi, x, mapped(x, D, MAP), MAP)
            store_rows(dk, rows, valid, dx, heads, key_tokens, D, BLOCK_D)

    i_bh, rows, there, valid = placed_keys(firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS)
    b_k = load_rows(rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_v = load_rows(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    first_row = i_bh.to(tl.int64) * tokens
    p_first = firsts + i_bh.to(tl.int64) * (2 * (blocks + dense) + 1) + 2 * i_k
    q = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
    slot_k = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    b_dk, b_dv = of_keys(
        b_k, b_v, slot_k, q, rows_of_head(grad_out, i_bh, (g_batch, g_head, g_row), heads, ALIGN), lse + first_row,
        delta + first_row, scale, query_places, entries, p_first, entries, (0, 0, 0), grid, 0, 0,
        D, BLOCK_D, BLOCK_K, ROWS, CUT_Q, STEP, False, PRECISION,
    )  # fmt: skip
    i_bh, rows, there, valid = placed_keys(firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS)
    linear = valid & (tl.arange(0, ROWS) < tl.where(visual, ROWS, 0))
    b_dk = b_dk * scale + stored_rows(dk, rows, linear, heads, key_tokens, D, BLOCK_D)
    b_dv += stored_rows(dv, rows, linear, heads, key_tokens, D, BLOCK_D)
    store_rows(dk, rows, there, tl.where(valid[:, None], b_dk, 0.0), heads, key_tokens, D, BLOCK_D)
    store_rows(dv, rows, there, tl.where(valid[:, None], b_dv, 0.0), heads, key_tokens, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    q, grad_out, inverses, ratios, dstates, dtotals, dbias,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over SPLIT tokens in fp32: a^T g / d [.., D, D], -a r / d [.., D] and g [.., D]."""
    q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    grad_out = rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN)
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
            # g / d may exceed the range of half precision: scale by the tile's largest value
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
