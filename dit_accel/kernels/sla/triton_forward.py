"""The forward kernels: the state of the linear branch, the lists, then both branches of a query block in one program.

README.md in this folder has the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import attend_lists, normalised, positive
from dit_accel.kernels.block_sparse.triton_tokens import (
    RUNTIME,
    list_of,
    load_rows,
    rows_of,
    rows_of_head,
    store_rows,
)
from dit_accel.kernels.sla.triton_linear import (
    EPS,
    behind,
    load_columns,
    load_part,
    mapped,
    mapped_columns,
    over_listed,
    over_marginal,
    placed,
    routed,
    scales_of_rows,
    slots_of,
    store_sums,
    stored_rows,
    times_table,
)


@triton.jit(do_not_specialize=RUNTIME)
def state_kernel(
    k, v, states, totals, means,
    k_batch, k_head, k_row, v_batch, v_head, v_row, T, H, W, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(k)^T v, fp32 [B, H, splits, D, D], and the sum of phi(k), fp32 [B, H, splits, D], over SPLIT blocks each.

    The same pass over k stores its block means for the router, fp32 [B, H, blocks, D].
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    STEPS: tl.constexpr = BLOCK // STEP
    k = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    v = rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    state = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    of_block = tl.zeros([BLOCK_D], dtype=tl.float32)
    held = 0.0
    o_d = tl.arange(0, BLOCK_D)
    means += tl.program_id(1).to(tl.int64) * blocks * D
    first = tl.program_id(0) * SPLIT
    for i in range(first * STEPS, tl.minimum(first + SPLIT, blocks) * STEPS):
        rows, valid = slots_of(i // STEPS, i % STEPS * STEP, (T, H, W), CUT, STEP)
        b_k = load_rows(k, rows, valid, D, BLOCK_D)
        b_v = load_rows(v, rows, valid, D, BLOCK_D)
        of_block = tl.sum(b_k.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, of_block)
        held = tl.sum(valid.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, held)
        phi = tl.where(valid[:, None], mapped(b_k, D, MAP), 0.0).to(b_v.dtype)
        state = tl.dot(tl.trans(phi), b_v, state, input_precision=PRECISION)
        total += tl.sum(phi.to(tl.float32), 0)
        # the mean of the block's steps up to here; the last step's remains
        tl.store(means + i // STEPS * D + o_d, tl.div_rn(of_block, of_block * 0.0 + held), mask=o_d < D)
    store_sums(states, totals, state, total, D, BLOCK_D)


@triton.jit
def with_state(
    acc, q, rows, valid, table, totals, width,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + phi(q) T, fp32 [BLOCK, BLOCK_D], for a table T [D, D]; phi(q) . z for z [D] in `totals`; divisors of rows.

    If UNIT, each row of phi is divided by its sum. The divisors are 0 otherwise.

    q is read a few columns at a time, and again for each sum: whole rows do not fit the registers. `width` equals
    BLOCK_D, but the compiler cannot see it: otherwise it unrolls the loops and keeps all columns in registers.
    """
    COLUMNS: tl.constexpr = min(BLOCK_D, 32)
    shift, size = scales_of_rows(q, rows, valid, width, D, BLOCK, COLUMNS, MAP)
    unit = tl.zeros([BLOCK], dtype=tl.float32)
    if UNIT:
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            inside = (first + tl.arange(0, COLUMNS) < D)[None, :]
            x = load_columns(q, rows, valid, first, 0.0, D, COLUMNS)
            unit += tl.sum(mapped_columns(x, shift, size, inside, MAP), 1)
        unit = tl.where(unit > 0.0, unit, 1.0)
    of_total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, width, COLUMNS, num_stages=1):
        columns = first + tl.arange(0, COLUMNS)
        x = load_columns(q, rows, valid, first, 0.0, D, COLUMNS)
        phi = mapped_columns(x, shift, size, (columns < D)[None, :], MAP)
        if UNIT:
            phi *= (1.0 / unit)[:, None]
        phi = phi.to(table.dtype.element_ty)
        of_total += tl.sum(phi.to(tl.float32) * tl.load(totals + columns, mask=columns < D, other=0.0)[None, :], 1)
        acc = tl.dot(phi, load_part(table, first, D, BLOCK_D, COLUMNS, False), acc, input_precision=PRECISION)
    return acc, of_total, unit


@triton.jit
def unit_rows(b_q, D: tl.constexpr, MAP: tl.constexpr):
    """phi(q) in the dtype of q, each row divided by its sum, so that products stay in the range of half precision."""
    phi = mapped(b_q, D, MAP)
    size = tl.sum(phi, 1)
    return (phi * (1.0 / tl.where(size > 0.0, size, 1.0))[:, None]).to(b_q.dtype)


@triton.jit(do_not_specialize=RUNTIME)
def sparse_linear_fwd_kernel(
    q, k, v, table, peaks, totals, weight, bias, critical, negligible, places, spans, text_lens,
    out, exact, lse, linear, denominators, modes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning,
    heads, tokens, query_blocks, blocks, dense, topk, skip, training,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] of one query block of one head; for training also what the backward reads.

    q holds the visual tokens only, k and v all tokens. The `dense` conditioning and text blocks, numbered behind the
    `blocks` visual ones, are attended exactly. The state over all keys is table * peak, [D, D] a head; in scope "all"
    it includes the projection. Key blocks are processed in steps of STEP rows.

    For training: exact [B, N, H, D] and lse fp32 [B, H, N] of the exact branch. In scope "marginal" also linear
    [B, N, H, D], the linear branch before its projection, and denominators fp32 [B, H, N], with eps. There modes int32
    [B, H, query_blocks] are 1 where the marginal blocks were summed one by one.
    """
    CUT_Q: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    grid = (T, H, W)
    if SCOPE == "marginal":
        zero, i_bh, rows, valid = placed(spans, grid, CUT_Q)
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        keys = behind(rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN), visual_start)
        values = behind(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), visual_start)
        lists = routed(critical, negligible, i_bh, tl.program_id(0) + zero, query_blocks, topk, skip)
        phi = unit_rows(load_rows(q_rows, rows, valid, D, BLOCK_D), D, MAP)
        acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        left = tl.zeros([BLOCK_Q], dtype=tl.float32)
        acc, left = over_listed(acc, left, phi, keys, values, lists, grid, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION)
        zero, i_bh, rows, valid = placed(spans, grid, CUT_Q)
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        peak = tl.load(peaks + i_bh)
        acc, of_all, size = with_state(
            acc * (-1.0 / peak), q_rows, rows, valid, table + i_bh.to(tl.int64) * (D * D),
            totals + i_bh.to(tl.int64) * D, BLOCK_D + zero, D, BLOCK_D, BLOCK_Q, MAP, True, PRECISION,
        )  # fmt: skip
        acc *= peak
        lost = valid & (2.0 * left > of_all)
        left = tl.maximum(of_all - left, 0.0)
        one_by_one = tl.max(lost.to(tl.int32), 0) > 0
        if one_by_one:
            keys = behind(rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN), visual_start)
            values = behind(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), visual_start)
            lists = routed(critical, negligible, i_bh, tl.program_id(0) + zero, query_blocks, topk, skip)
            phi = unit_rows(load_rows(q_rows, rows, valid, D, BLOCK_D), D, MAP)
            acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
            left = tl.zeros([BLOCK_Q], dtype=tl.float32)
            acc, left = over_marginal(
                acc, left, phi, keys, values, lists, grid, blocks, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION
            )  # fmt: skip
        denominator = left + EPS / size
        b_l = (acc * (1.0 / denominator)[:, None]).to(q.dtype.element_ty)
        if training:
            store_rows(linear, rows, valid, b_l, heads, tokens, D, BLOCK_D)
            tl.store(denominators + i_bh.to(tl.int64) * tokens + rows, denominator * size, mask=valid)
            tl.store(modes + i_bh * query_blocks + tl.program_id(0), tl.where(one_by_one, 1, 0))
        # the linear branch waits in the output: its registers are needed for the exact branch
        acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        acc = times_table(b_l, weight, acc, D, BLOCK_D, True, PRECISION)
        store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)

    _, i_bh, rows, valid = placed(spans, grid, CUT_Q)
    keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
    values = rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN)
    q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
    b_q, positive_scale = positive(load_rows(q_rows, rows, valid, D, BLOCK_D), scale)
    acc, peak, total = attend_lists(
        b_q, keys, values, positive_scale, list_of(i_bh * query_blocks + tl.program_id(0), places, spans, topk + dense),
        spans, (visual_start, conditioning_start, text_start), grid, conditioning, tl.load(text_lens + i_bh // heads),
        D, BLOCK_D, BLOCK_Q, CUT, STEP, False, PRECISION,
    )  # fmt: skip
    acc, b_lse = normalised(acc, peak, total)
    zero, i_bh, rows, valid = placed(spans, grid, CUT_Q)
    if training:
        store_rows(exact, rows, valid, acc, heads, tokens, D, BLOCK_D)
        tl.store(lse + i_bh.to(tl.int64) * tokens + rows, b_lse, mask=valid)
    if SCOPE == "marginal":
        acc += stored_rows(out, rows, valid, heads, tokens, D, BLOCK_D)
    else:
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        acc_l = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        acc_l, of_total, _ = with_state(
            acc_l, q_rows, rows, valid, table + i_bh.to(tl.int64) * (D * D), totals + i_bh.to(tl.int64) * D,
            BLOCK_D + zero, D, BLOCK_D, BLOCK_Q, MAP, False, PRECISION,
        )  # fmt: skip
        acc += acc_l * (tl.load(peaks + i_bh) / (of_total + EPS))[:, None]
    if HAS_BIAS:
        o_d = tl.arange(0, BLOCK_D)
        acc += tl.load(bias + o_d, mask=o_d < D, other=0.0)[None, :]
    store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)
