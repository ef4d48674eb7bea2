"""The backward kernels: dq over lists, the gradient of the state, dk and dv over transposed lists.

README.md in this folder has the equations. In scope "all" the table includes the projection, and g is the gradient of
the whole output. In scope "marginal" g is the gradient behind the projection; critical and negligible blocks are
subtracted from the sums over all blocks. Query blocks that the forward summed one by one have no part in the totals;
their terms are added one by one here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_backward import over_query_lists, row_lse
from dit_accel.kernels.block_sparse.triton_forward import over_key_lists
from dit_accel.kernels.block_sparse.triton_tokens import (
    key_list,
    load_rows,
    rows_of,
    rows_of_head,
    store_rows,
    visual_only,
    visual_slots,
)
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import Query, SegmentRows, Visits
from dit_accel.kernels.sla.triton_linear import (
    EPS,
    from_row,
    hidden_zero,
    load_columns,
    load_part,
    load_total,
    mapped,
    mapped_columns,
    over_blocks,
    over_selecting,
    pulled_back,
    pulled_columns,
    recomputed_keys,
    recomputed_queries,
    routes_of,
    scales_of_rows,
    store_sums,
    stored_rows,
    table_of,
    times_table,
)


class Statistics(NamedTuple):
    """Of every query, fp32 [B, H, N]: LSE, delta, 1 / d, r and d; and modes, see `triton_linear.Selecting`.

    delta = rowsum(exact * grad_out). 1 / d is 0 for rows that have no part in the totals.
    """

    lse: Any
    delta: Any
    inverses: Any
    ratios: Any
    denominators: Any
    modes: Any


class LinearRows(NamedTuple):
    """Rows of one head's `HeadRows` x, their g [ROWS, BLOCK_D], the head's T = table * peak, and its totals z.

    shift, size: see `triton_linear.scales_of_rows`; width: see `triton_forward.with_state`.
    """

    x: Any
    rows: Any
    valid: Any
    shift: Any
    size: Any
    b_g: Any
    table: Any
    peak: Any
    totals: Any
    width: Any


@triton.jit
def columns_of(
    linear, first, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """x, phi(x), U = g T^T and z of COLUMNS columns of `LinearRows` from `first` on."""
    o_c = first + tl.arange(0, COLUMNS)
    o_d = tl.arange(0, BLOCK_D)
    b_x = load_columns(linear.x, linear.rows, linear.valid, first, 0.0, D, COLUMNS).to(tl.float32)
    phi = mapped_columns(b_x, linear.shift, linear.size, (o_c < D)[None, :], MAP)
    # T^T [BLOCK_D, COLUMNS]
    inside = (o_d < D)[:, None] & (o_c < D)[None, :]
    b_t = tl.load(linear.table + o_c[None, :] * D + o_d[:, None], mask=inside, other=0.0)
    b_u = tl.dot(linear.b_g, b_t, input_precision="ieee") * linear.peak
    return b_x, phi, b_u, tl.load(linear.totals + o_c, mask=o_c < D, other=0.0)


@triton.jit
def sums_through(
    linear, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """phi . U and phi . z of each of `LinearRows`, and both for phi rounded to the table's dtype: fp32 [ROWS] each.

    This and `store_through` walk the columns and read x each time; see `triton_forward.with_state` for the reason.
    """
    with_u = tl.zeros([ROWS], dtype=tl.float32)
    with_z = tl.zeros([ROWS], dtype=tl.float32)
    rounded_with_u = tl.zeros([ROWS], dtype=tl.float32)
    rounded_with_z = tl.zeros([ROWS], dtype=tl.float32)
    for first in tl.range(0, linear.width, COLUMNS, num_stages=1):
        _, phi, b_u, b_z = columns_of(linear, first, D, BLOCK_D, COLUMNS, MAP)
        rounded = phi.to(linear.table.dtype.element_ty).to(tl.float32)
        with_u += tl.sum(phi * b_u, 1)
        with_z += tl.sum(phi * b_z[None, :], 1)
        rounded_with_u += tl.sum(rounded * b_u, 1)
        rounded_with_z += tl.sum(rounded * b_z[None, :], 1)
    return with_u, with_z, rounded_with_u, rounded_with_z


@triton.jit
def store_through(
    out, linear, sums, a, c, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Store dx to `out` [B, N, H, D], where dphi = (U + a z) c for numbers a and c a row; sums: phi . U and phi . z."""
    i_bh = tl.program_id(1)
    with_u, with_z = sums
    of_row = (with_u + a * with_z) * c
    place = (((i_bh // heads).to(tl.int64) * tokens + linear.rows) * heads + i_bh % heads) * D
    for first in tl.range(0, linear.width, COLUMNS, num_stages=1):
        b_x, phi, b_u, b_z = columns_of(linear, first, D, BLOCK_D, COLUMNS, MAP)
        of_phi = (b_u + a[:, None] * b_z[None, :]) * c[:, None]
        o_c = first + tl.arange(0, COLUMNS)
        value = pulled_columns(of_phi, b_x, phi, of_row, MAP).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + o_c, value, mask=linear.valid[:, None] & (o_c < D))


@kernel
def sparse_linear_bwd_kernel_dq(
    dq, q, k, v, grad_out, pulled, exact, state, routes, lists, statistics, layout, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr,
):  # fmt: skip
    """dq [B, N, H, D] of one query block of one head; arguments as in the forward kernel, `exact` as `Heads`.

    Stores delta, 1 / d and r of `statistics` for dk and dv. In scope "marginal", pulled [B, H, N, D] is the gradient
    behind the projection, grad_out W.
    """
    i_bh = tl.program_id(1)
    queries, keys, tokens = layout.queries, layout.keys, layout.queries.tokens
    visual_start, conditioning_start, text_start, text_lens = layout.segments
    q = rows_of(q, heads, ALIGN)
    k_rows = rows_of(k, heads, ALIGN)
    v_rows = rows_of(v, heads, ALIGN)
    rows, valid, _raster = visual_slots(tl.program_id(0), tl.arange(0, BLOCK_Q), queries, BLOCK_Q, TILE_Q)
    place = i_bh.to(tl.int64) * tokens + rows
    gradients = rows_of(grad_out, heads, ALIGN)
    table = table_of(state.table, D)
    peak = tl.load(state.peaks + i_bh)
    # the linear branch's part waits in dq: its registers are needed for the exact branch
    if SCOPE == "all":
        totals = state.totals + i_bh.to(tl.int64) * D
        width = BLOCK_D + hidden_zero(lists.spans)
        COLUMNS: tl.constexpr = min(BLOCK_D, 32)
        b_g = load_rows(gradients, rows, valid, D, BLOCK_D).to(table.dtype.element_ty)
        shift, size = scales_of_rows(q, rows, valid, width, D, BLOCK_Q, COLUMNS, MAP)
        linear = LinearRows(q, rows, valid, shift, size, b_g, table, peak, totals, width)
        with_u, with_z, ratio, denominator = sums_through(linear, D, BLOCK_D, BLOCK_Q, COLUMNS, MAP)
        inverse = 1.0 / (denominator + EPS)
        ratio *= inverse
        tl.store(statistics.inverses + place, inverse, mask=valid)
        store_through(
            dq, linear, (with_u, with_z), -ratio, inverse, heads, tokens, D, BLOCK_D, COLUMNS, MAP
        )  # fmt: skip
    else:
        b_q = load_rows(q, rows, valid, D, BLOCK_D)
        b_g = load_rows(rows_of(pulled, heads, ALIGN), rows, valid, D, BLOCK_D).to(b_q.dtype)
        selected = routes_of(routes, i_bh, tl.program_id(0), queries.blocks)
        k_visual, v_visual = from_row(k_rows, visual_start), from_row(v_rows, visual_start)
        one_by_one = tl.load(statistics.modes + i_bh * queries.blocks + tl.program_id(0)) != 0
        of_phi = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        if one_by_one:
            of_phi, total = over_blocks(
                of_phi, total, b_g, k_visual, v_visual, selected, keys, D, BLOCK_D, BLOCK_K, TILE_K, STEP, MAP,
                True, True,
            )  # fmt: skip
        else:
            of_phi, total = over_blocks(
                of_phi, total, b_g, k_visual, v_visual, selected, keys, D, BLOCK_D, BLOCK_K, TILE_K, STEP, MAP,
                False, True,
            )  # fmt: skip
            of_phi = times_table(b_g, table, of_phi * (-1.0 / peak), D, BLOCK_D, True) * peak
            total = load_total(state.totals, D, BLOCK_D) - total
        x = load_rows(q, rows, valid, D, BLOCK_D).to(tl.float32)
        phi = mapped(x, D, MAP)
        inverse = 1.0 / tl.load(statistics.denominators + place, mask=valid, other=1.0)
        ratio = tl.sum(phi * of_phi, 1) * inverse
        tl.store(statistics.inverses + place, tl.where(one_by_one, 0.0, inverse), mask=valid)
        of_phi = (of_phi - ratio[:, None] * total[None, :]) * inverse[:, None]
        store_rows(dq, rows, valid, pulled_back(of_phi, x, phi, MAP), heads, tokens, D, BLOCK_D)
    tl.store(statistics.ratios + place, ratio, mask=valid)

    _, i_bh, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
    place = i_bh.to(tl.int64) * tokens + rows
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(gradients, rows, valid, D, BLOCK_D)
    b_e = load_rows(rows_of(exact, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_delta = tl.sum(b_e.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(statistics.delta + place, b_delta, mask=valid)
    listed = key_list(i_bh * queries.blocks + tl.program_id(0), lists)
    segments = SegmentRows(visual_start, conditioning_start, text_start, tl.load(text_lens + i_bh // heads))
    sums = over_key_lists(
        Query(b_q, b_g.to(b_q.dtype), row_lse(statistics.lse, place, valid), b_delta), k_rows, v_rows, scale, listed,
        lists.words, segments, keys, D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, STEP, False, True,
    )  # fmt: skip
    _, _, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
    acc = sums[0] * scale + stored_rows(dq, rows, valid, heads, tokens, D, BLOCK_D)
    store_rows(dq, rows, valid, acc, heads, tokens, D, BLOCK_D)


@kernel
def sparse_linear_bwd_kernel_dkdv(
    dk, dv, q, k, v, grad_out, pulled, gradient, routes, selecting, statistics, layout, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of ROWS rows of one key block. Conditioning and text have no linear branch.

    Args:
        gradient: of the state, a `StateTable`; G is table * peak, -w its totals.
        selecting: `Selecting`; in scope "all" the negligible blocks and those summed one by one are not read. Query
            blocks are taken in steps of STEP rows.
    """
    PARTS: tl.constexpr = BLOCK_K // ROWS
    tokens, key_tokens = layout.queries.tokens, layout.keys.tokens
    i_k = tl.program_id(0) // PARTS
    visual = i_k < routes.blocks
    counts = selecting.firsts
    i_bh, rows, there, valid = recomputed_keys(counts, layout, heads, BLOCK_K, TILE_K, ROWS)
    b_v = load_rows(rows_of_head(v, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    k_rows = rows_of_head(k, i_bh, heads, ALIGN)
    first_row = i_bh.to(tl.int64) * tokens
    # the linear branch's part waits in dk and dv: its registers are needed for the exact branch
    if visual:
        table = table_of(gradient.table, D)
        peak = tl.load(gradient.peaks + i_bh)
        of_v = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        if SCOPE == "all":
            COLUMNS: tl.constexpr = min(BLOCK_D, 32)
            width = BLOCK_D + hidden_zero(counts)
            totals = gradient.totals + i_bh.to(tl.int64) * D
            shift, size = scales_of_rows(k_rows, rows, valid, width, D, ROWS, COLUMNS, MAP)
            for first in tl.range(0, width, COLUMNS, num_stages=1):
                inside = (first + tl.arange(0, COLUMNS) < D)[None, :]
                x = load_columns(k_rows, rows, valid, first, 0.0, D, COLUMNS)
                phi = mapped_columns(x, shift, size, inside, MAP)
                b_t = load_part(table, first, D, BLOCK_D, COLUMNS, False)
                of_v = tl.dot(phi.to(b_t.dtype), b_t, of_v, input_precision="ieee")
            store_rows(dv, rows, valid, of_v * peak, heads, key_tokens, D, BLOCK_D)
            one = tl.full([ROWS], 1.0, dtype=tl.float32)
            linear_rows = LinearRows(k_rows, rows, valid, shift, size, b_v, table, peak, totals, width)
            with_u, with_z, _with_u, _with_z = sums_through(linear_rows, D, BLOCK_D, ROWS, COLUMNS, MAP)
            store_through(
                dk, linear_rows, (with_u, with_z), one, one, heads, key_tokens, D, BLOCK_D, COLUMNS, MAP
            )  # fmt: skip
        else:
            total = load_total(gradient.totals, D, BLOCK_D)
            of_phi = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
            phi_k = mapped(load_rows(k_rows, rows, valid, D, BLOCK_D), D, MAP).to(b_v.dtype)
            read = (
                rows_of(q, heads, ALIGN), rows_of(pulled, heads, ALIGN),
                statistics.denominators + first_row, statistics.ratios + first_row,
            )  # fmt: skip
            of_v, of_phi, total = over_selecting(
                (of_v, of_phi, total), phi_k, b_v, i_k, read, routes, selecting, layout,
                D, BLOCK_D, BLOCK_Q, TILE_Q, STEP, MAP,
            )  # fmt: skip
            i_bh, rows, there, valid = recomputed_keys(counts, layout, heads, BLOCK_K, TILE_K, ROWS)
            k_rows = rows_of_head(k, i_bh, heads, ALIGN)
            peak = tl.load(gradient.peaks + i_bh)
            of_v = times_table(phi_k, table, of_v * (1.0 / peak), D, BLOCK_D, False) * peak
            store_rows(dv, rows, valid, of_v, heads, key_tokens, D, BLOCK_D)
            of_phi = times_table(b_v, table, of_phi * (1.0 / peak), D, BLOCK_D, True) * peak + total[None, :]
            # k is loaded again to shorten its live range; otherwise the kernel spills
            x = load_rows(k_rows, rows, valid, D, BLOCK_D).to(tl.float32)
            dx = pulled_back(of_phi, x, mapped(x, D, MAP), MAP)
            store_rows(dk, rows, valid, dx, heads, key_tokens, D, BLOCK_D)

    i_bh, rows, there, valid = recomputed_keys(counts, layout, heads, BLOCK_K, TILE_K, ROWS)
    b_k = load_rows(rows_of_head(k, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_v = load_rows(rows_of_head(v, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    first_row = i_bh.to(tl.int64) * tokens
    p_first = counts + i_bh.to(tl.int64) * (2 * layout.keys.blocks + 1) + 2 * i_k
    q_rows = rows_of_head(q, i_bh, heads, ALIGN)
    slot_k = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    entries = selecting.entries
    visits = Visits(entries, selecting.places, entries, counts, entries, 1)  # no words are read
    b_dk, b_dv = over_query_lists(
        b_k, b_v, slot_k, q_rows, rows_of_head(grad_out, i_bh, heads, ALIGN), statistics.lse + first_row,
        statistics.delta + first_row, scale, visits, p_first, SegmentRows(0, 0, 0, 0), visual_only(layout.queries),
        D, BLOCK_D, BLOCK_K, ROWS, BLOCK_Q, TILE_Q, STEP, False,
    )  # fmt: skip
    i_bh, rows, there, valid = recomputed_keys(counts, layout, heads, BLOCK_K, TILE_K, ROWS)
    linear = valid & (tl.arange(0, ROWS) < tl.where(visual, ROWS, 0))
    b_dk = b_dk * scale + stored_rows(dk, rows, linear, heads, key_tokens, D, BLOCK_D)
    b_dv += stored_rows(dv, rows, linear, heads, key_tokens, D, BLOCK_D)
    store_rows(dk, rows, there, tl.where(valid[:, None], b_dk, 0.0), heads, key_tokens, D, BLOCK_D)
    store_rows(dv, rows, there, tl.where(valid[:, None], b_dv, 0.0), heads, key_tokens, D, BLOCK_D)


@kernel
def sums_kernel(
    dstates, dtotals, dbias, q, grad_out, inverses, ratios, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """Sums over SPLIT tokens in fp32: a^T g / d [.., D, D], -a r / d [.., D] and g [.., D]."""
    q = rows_of(q, heads, ALIGN)
    grad_out = rows_of(grad_out, heads, ALIGN)
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
            dstate += tl.dot(tl.trans(phi), shares, input_precision="ieee") * largest
        else:
            dstate = tl.dot(tl.trans(phi), shares.to(b_q.dtype), dstate, input_precision="ieee")
    store_sums(dstates, dtotals, dstate, dtotal, D, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dbias + place * D + o_d, b_dbias, mask=o_d < D)
