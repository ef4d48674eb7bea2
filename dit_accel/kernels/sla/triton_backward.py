"""The fused backward kernels: dq over a query block's lists, dk and dv over the query blocks that list a key block.

Critical blocks, as in the engine: ds = p (dp - delta). Linear branch, with a = phi(q), b = phi(k), H and z the sums of
b^T v and b over its key blocks, d = a . z + eps and g the gradient of its output: U = g H^T, r = a . U / d,
da = (U - r z) / d; and dv = b G, db = v G^T - w with G = sum of a^T g / d, w = sum of a r / d over the query blocks
that see a key block. In scope "all" the projection is part of H, and g that of the whole output. In scope "marginal"
sums over all blocks are subtracted by what critical and skipped ones add to them; query blocks that were summed one by
one in the forward pass (see `triton_marginal`) are left out of the totals and added one by one here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_backward import of_keys, of_queries, row_lse
from dit_accel.kernels.block_sparse.triton_tokens import list_of, load_rows, rows_of, rows_of_head, store_rows
from dit_accel.kernels.sla.triton_features import EPS, mapped, mapped_columns, pulled_back, scales_of_rows
from dit_accel.kernels.sla.triton_marginal import over_listed, over_others, over_selecting, routed
from dit_accel.kernels.sla.triton_rows import (
    behind,
    hidden_zero,
    load_columns,
    load_part,
    load_total,
    placed,
    placed_keys,
    slots_of,
    stored_rows,
    table_of,
    times_table,
)
from dit_accel.kernels.sla.triton_through import store_through, sums_through


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row", "p_batch", "p_head", "p_row", "e_batch", "e_head", "e_row",
    "T", "H", "W", "visual_start", "conditioning_start", "text_start", "conditioning",
    "heads", "tokens", "blocks", "dense", "n_kept", "n_dropped",
])  # fmt: skip
def sparse_linear_bwd_kernel_dq(
    q, k, v, grad_out, pulled, exact, lse, table, peaks, totals, kept, dropped, places, spans, text_lens,
    denominators, modes, dq, delta, inverses, ratios,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    p_batch, p_head, p_row, e_batch, e_head, e_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning,
    heads, tokens, blocks, dense, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D] of one query block of one head; arguments as in the forward kernel.

    For dk and dv, fp32 [B, H, N]: delta = rowsum(exact * grad_out), r, and 1 / d, 0 where the totals leave a row out.
    pulled [B, H, N, D]: the gradient behind the projection, grad_out W, in scope "marginal".
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    i_bh = tl.program_id(1)
    grid = (T, H, W)
    q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    keys = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    values = rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    rows, valid = slots_of(tl.program_id(0), 0, grid, CUT, BLOCK)
    place = i_bh.to(tl.int64) * tokens + rows
    gradients = rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN)
    table = table_of(table, D)
    peak = tl.load(peaks + i_bh)
    # what comes through the linear branch waits in dq: beside the exact one there are no registers for it
    if SCOPE == "all":
        totals += i_bh.to(tl.int64) * D
        width = BLOCK_D + hidden_zero(spans)
        COLUMNS: tl.constexpr = min(BLOCK_D, 32)
        b_g = load_rows(gradients, rows, valid, D, BLOCK_D).to(table.dtype.element_ty)
        shift, size = scales_of_rows(q, rows, valid, width, D, BLOCK, COLUMNS, MAP)
        with_u, with_z, ratio, denominator = sums_through(
            q, rows, valid, shift, size, b_g, table, peak, totals, width, D, BLOCK_D, BLOCK, COLUMNS, MAP, PRECISION
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
        lists = routed(kept, dropped, i_bh, tl.program_id(0), blocks, n_kept, n_dropped)
        k_visual, v_visual = behind(keys, visual_start), behind(values, visual_start)
        one_by_one = tl.load(modes + i_bh * blocks + tl.program_id(0)) != 0
        of_phi = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        if one_by_one:
            of_phi, total = over_others(
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

    _, i_bh, rows, valid = placed(spans, grid, CUT)
    place = i_bh.to(tl.int64) * tokens + rows
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(gradients, rows, valid, D, BLOCK_D)
    b_e = load_rows(rows_of(exact, (e_batch, e_head, e_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_delta = tl.sum(b_e.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(delta + place, b_delta, mask=valid)
    acc = of_queries(
        b_q, b_g.to(b_q.dtype), row_lse(lse, place, valid), b_delta, keys, values, scale,
        list_of(i_bh * blocks + tl.program_id(0), places, spans, n_kept + dense), spans,
        (visual_start, conditioning_start, text_start), grid, conditioning, tl.load(text_lens + i_bh // heads),
        D, BLOCK_D, BLOCK, CUT, STEP, False, PRECISION,
    )  # fmt: skip
    _, _, rows, valid = placed(spans, grid, CUT)
    acc = acc * scale + stored_rows(dq, rows, valid, heads, tokens, D, BLOCK_D)
    store_rows(dq, rows, valid, acc, heads, tokens, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row", "p_batch", "p_head", "p_row",
    "T", "H", "W", "visual_start", "conditioning_start", "text_start", "conditioning", "text",
    "heads", "tokens", "key_tokens", "blocks", "dense", "n_kept", "n_dropped",
])  # fmt: skip
def sparse_linear_bwd_kernel_dkdv(
    q, k, v, grad_out, pulled, lse, delta, table, peaks, dtotals, kept, dropped, text_lens,
    entries, query_places, firsts, dropped_entries, dropped_firsts,
    modes, singles, n_singles, denominators, ratios, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    p_batch, p_head, p_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning, text,
    heads, tokens, key_tokens, blocks, dense, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of ROWS rows of one key block. G is table * peak, -w is dtotals.

    The query blocks that attend to it exactly are listed as in `triton_lists.Transposed` (entries, query_places,
    firsts). Conditioning and text blocks, behind the visual ones, get nothing from the linear branch. In scope
    "marginal" those that drop it are listed alike, and the first n_singles of `singles` [B, H, blocks] are those
    that were summed one by one. Steps take STEP rows of a query block.
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    PARTS: tl.constexpr = BLOCK // ROWS
    i_k = tl.program_id(0) // PARTS
    visual = i_k < blocks
    grid = (T, H, W)
    starts = (visual_start, conditioning_start, text_start)
    i_bh, rows, there, valid = placed_keys(firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS)
    b_v = load_rows(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
    first_row = i_bh.to(tl.int64) * tokens
    # what comes through the linear branch waits in dk and dv: beside the exact one there are no registers for it
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
                (denominators + first_row, ratios + first_row), (kept, dropped, n_kept, n_dropped),
                (entries, firsts, dropped_entries, dropped_firsts), (modes, singles, n_singles), grid, blocks, dense,
                D, BLOCK_D, CUT, STEP, MAP, PRECISION,
            )  # fmt: skip
            i_bh, rows, there, valid = placed_keys(
                firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS
            )
            keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
            peak = tl.load(peaks + i_bh)
            of_v = times_table(phi_k, table, of_v * (1.0 / peak), D, BLOCK_D, False, PRECISION) * peak
            store_rows(dv, rows, valid, of_v, heads, key_tokens, D, BLOCK_D)
            of_phi = times_table(b_v, table, of_phi * (1.0 / peak), D, BLOCK_D, True, PRECISION) * peak + total[None, :]
            # k is read again: held all the while, it would be registers that are not there
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
        D, BLOCK_D, BLOCK, ROWS, CUT, STEP, False, PRECISION,
    )  # fmt: skip
    i_bh, rows, there, valid = placed_keys(firsts, text_lens, starts, grid, conditioning, text, heads, CUT, ROWS)
    linear = valid & (tl.arange(0, ROWS) < tl.where(visual, ROWS, 0))
    b_dk = b_dk * scale + stored_rows(dk, rows, linear, heads, key_tokens, D, BLOCK_D)
    b_dv += stored_rows(dv, rows, linear, heads, key_tokens, D, BLOCK_D)
    store_rows(dk, rows, there, tl.where(valid[:, None], b_dk, 0.0), heads, key_tokens, D, BLOCK_D)
    store_rows(dv, rows, there, tl.where(valid[:, None], b_dv, 0.0), heads, key_tokens, D, BLOCK_D)
