"""The fused forward kernel: a query block's critical blocks in one softmax and its linear branch, in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import attend_lists, normalised, positive
from dit_accel.kernels.block_sparse.triton_tokens import list_of, load_rows, rows_of_head, store_rows
from dit_accel.kernels.sla.triton_features import EPS, mapped, mapped_columns, scales_of_rows
from dit_accel.kernels.sla.triton_marginal import over_listed, over_others, routed
from dit_accel.kernels.sla.triton_rows import behind, load_columns, load_part, placed, stored_rows, times_table


@triton.jit
def with_state(
    acc, q, rows, valid, table, totals, width,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + phi(q) T of a query block, fp32 [BLOCK, BLOCK_D], for a table T [D, D]; phi(q) . z for z [D] in `totals`.

    If UNIT, rows of phi are brought to the sum 1, and what they were divided by comes last.

    q is read some columns at a time, and again for each sum: whole rows would be registers that are not there. `width`
    is BLOCK_D, unknown to the compiler, which would unroll the loops and hold the columns all the same.
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
    """phi(q), rows brought to the sum 1, so that products stay in the range of half precision; in the dtype of q."""
    phi = mapped(b_q, D, MAP)
    size = tl.sum(phi, 1)
    return (phi * (1.0 / tl.where(size > 0.0, size, 1.0))[:, None]).to(b_q.dtype)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "T", "H", "W", "visual_start", "conditioning_start", "text_start", "conditioning",
    "heads", "tokens", "blocks", "dense", "n_kept", "n_dropped", "training",
])  # fmt: skip
def sparse_linear_fwd_kernel(
    q, k, v, table, peaks, totals, weight, bias, kept, dropped, places, spans, text_lens,
    out, exact, lse, linear, denominators, modes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale,
    T, H, W, visual_start, conditioning_start, text_start, conditioning,
    heads, tokens, blocks, dense, n_kept, n_dropped, training,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] of one query block of one head; for training also what the backward wants.

    q holds the visual tokens alone, k and v all tokens; text and conditioning blocks, `dense` of them behind the
    `blocks` visual ones, are attended exactly. The state over all keys is table * peak, [D, D] a head, in
    scope "all" with the projection applied. Key blocks are taken in steps of STEP rows.

    exact [B, N, H, D] and lse fp32 [B, H, N]: of the critical blocks. In scope "marginal" linear [B, N, H, D]: the
    linear branch before its projection; denominators fp32 [B, H, N], with eps; modes int32 [B, H, blocks]: 1 where the
    marginal blocks were summed one by one.
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    grid = (T, H, W)
    if SCOPE == "marginal":
        zero, i_bh, rows, valid = placed(spans, grid, CUT)
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        keys = behind(rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN), visual_start)
        values = behind(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), visual_start)
        lists = routed(kept, dropped, i_bh, tl.program_id(0) + zero, blocks, n_kept, n_dropped)
        phi = unit_rows(load_rows(q_rows, rows, valid, D, BLOCK_D), D, MAP)
        acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        left = tl.zeros([BLOCK], dtype=tl.float32)
        acc, left = over_listed(acc, left, phi, keys, values, lists, grid, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION)
        zero, i_bh, rows, valid = placed(spans, grid, CUT)
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        peak = tl.load(peaks + i_bh)
        acc, of_all, size = with_state(
            acc * (-1.0 / peak), q_rows, rows, valid, table + i_bh.to(tl.int64) * (D * D),
            totals + i_bh.to(tl.int64) * D, BLOCK_D + zero, D, BLOCK_D, BLOCK, MAP, True, PRECISION,
        )  # fmt: skip
        acc *= peak
        lost = valid & (2.0 * left > of_all)
        left = tl.maximum(of_all - left, 0.0)
        one_by_one = tl.max(lost.to(tl.int32), 0) > 0
        if one_by_one:
            keys = behind(rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN), visual_start)
            values = behind(rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN), visual_start)
            lists = routed(kept, dropped, i_bh, tl.program_id(0) + zero, blocks, n_kept, n_dropped)
            phi = unit_rows(load_rows(q_rows, rows, valid, D, BLOCK_D), D, MAP)
            acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
            left = tl.zeros([BLOCK], dtype=tl.float32)
            acc, left = over_others(
                acc, left, phi, keys, values, lists, grid, blocks, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION
            )  # fmt: skip
        denominator = left + EPS / size
        b_l = (acc * (1.0 / denominator)[:, None]).to(q.dtype.element_ty)
        if training:
            store_rows(linear, rows, valid, b_l, heads, tokens, D, BLOCK_D)
            tl.store(denominators + i_bh.to(tl.int64) * tokens + rows, denominator * size, mask=valid)
            tl.store(modes + i_bh * blocks + tl.program_id(0), tl.where(one_by_one, 1, 0))
        # beside the sums of the exact branch there are no registers for the linear one: it waits in the output
        acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        acc = times_table(b_l, weight, acc, D, BLOCK_D, True, PRECISION)
        store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)

    _, i_bh, rows, valid = placed(spans, grid, CUT)
    keys = rows_of_head(k, i_bh, (k_batch, k_head, k_row), heads, ALIGN)
    values = rows_of_head(v, i_bh, (v_batch, v_head, v_row), heads, ALIGN)
    q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
    b_q, positive_scale = positive(load_rows(q_rows, rows, valid, D, BLOCK_D), scale)
    acc, peak, total = attend_lists(
        b_q, keys, values, positive_scale, list_of(i_bh * blocks + tl.program_id(0), places, spans, n_kept + dense),
        spans, (visual_start, conditioning_start, text_start), grid, conditioning, tl.load(text_lens + i_bh // heads),
        D, BLOCK_D, BLOCK, CUT, STEP, False, PRECISION,
    )  # fmt: skip
    acc, b_lse = normalised(acc, peak, total)
    zero, i_bh, rows, valid = placed(spans, grid, CUT)
    if training:
        store_rows(exact, rows, valid, acc, heads, tokens, D, BLOCK_D)
        tl.store(lse + i_bh.to(tl.int64) * tokens + rows, b_lse, mask=valid)
    if SCOPE == "marginal":
        acc += stored_rows(out, rows, valid, heads, tokens, D, BLOCK_D)
    else:
        q_rows = rows_of_head(q, i_bh, (q_batch, q_head, q_row), heads, ALIGN)
        acc_l = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        acc_l, of_total, _ = with_state(
            acc_l, q_rows, rows, valid, table + i_bh.to(tl.int64) * (D * D), totals + i_bh.to(tl.int64) * D,
            BLOCK_D + zero, D, BLOCK_D, BLOCK, MAP, False, PRECISION,
        )  # fmt: skip
        acc += acc_l * (tl.load(peaks + i_bh) / (of_total + EPS))[:, None]
    if HAS_BIAS:
        o_d = tl.arange(0, BLOCK_D)
        acc += tl.load(bias + o_d, mask=o_d < D, other=0.0)[None, :]
    store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)
