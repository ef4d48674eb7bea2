"""The forward kernels: the state of the linear branch, the lists, then both branches of a query block in one program.

README.md in this folder has the equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import finalize, over_key_lists, with_positive_scale
from dit_accel.kernels.block_sparse.triton_tokens import (
    key_list,
    load_rows,
    rows_of,
    rows_of_head,
    store_rows,
    visual_slots,
)
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import Query, SegmentRows
from dit_accel.kernels.sla.triton_linear import (
    EPS,
    from_row,
    load_columns,
    load_part,
    mapped,
    mapped_columns,
    over_blocks,
    recomputed_queries,
    routes_of,
    scales_of_rows,
    store_sums,
    stored_rows,
    times_table,
)


class SavedBranches(NamedTuple):
    """What the forward writes for the backward if `training` is not 0; README.md has the symbols.

    Attributes:
        exact, lse: [B, N, H, D] and fp32 [B, H, N] of the exact branch.
        linear, denominators: in scope "marginal" the linear branch before its projection, and d with eps.
        modes: see `triton_linear.Selecting`.
    """

    exact: Any
    lse: Any
    linear: Any
    denominators: Any
    modes: Any
    training: Any


@kernel
def state_kernel(
    states, totals, means, k, v, keys, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """phi(k)^T v, fp32 [B, H, splits, D, D], and the sum of phi(k), fp32 [B, H, splits, D], over SPLIT blocks each.

    The same pass over k stores its block means for the router, fp32 [B, H, blocks, D].
    """
    STEPS: tl.constexpr = BLOCK // STEP
    k = rows_of(k, heads, ALIGN)
    v = rows_of(v, heads, ALIGN)
    state = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    of_block = tl.zeros([BLOCK_D], dtype=tl.float32)
    held = 0.0
    o_d = tl.arange(0, BLOCK_D)
    means += tl.program_id(1).to(tl.int64) * blocks * D
    first = tl.program_id(0) * SPLIT
    for i in range(first * STEPS, tl.minimum(first + SPLIT, blocks) * STEPS):
        rows, valid, _raster = visual_slots(i // STEPS, i % STEPS * STEP + tl.arange(0, STEP), keys, BLOCK, TILE)
        b_k = load_rows(k, rows, valid, D, BLOCK_D)
        b_v = load_rows(v, rows, valid, D, BLOCK_D)
        of_block = tl.sum(b_k.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, of_block)
        held = tl.sum(valid.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, held)
        phi = tl.where(valid[:, None], mapped(b_k, D, MAP), 0.0).to(b_v.dtype)
        state = tl.dot(tl.trans(phi), b_v, state, input_precision="ieee")
        total += tl.sum(phi.to(tl.float32), 0)
        # the mean of the block's steps up to here; the last step's remains
        tl.store(means + i // STEPS * D + o_d, tl.div_rn(of_block, of_block * 0.0 + held), mask=o_d < D)
    store_sums(states, totals, state, total, D, BLOCK_D)


@triton.jit
def with_state(
    acc, q, rows, valid, state, i_bh, zero,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """acc + phi(q) T, fp32 [BLOCK, BLOCK_D], for a head's table T in `state`; phi(q) . z for its totals z; divisors.

    If UNIT, each row of phi is divided by its sum. The divisors are 0 otherwise.

    q is read a few columns at a time, and again for each sum: whole rows do not fit the registers. With a `hidden_zero`
    the compiler cannot see that `width` is BLOCK_D: otherwise it unrolls the loops and keeps all columns in registers.
    """
    COLUMNS: tl.constexpr = min(BLOCK_D, 32)
    table, totals = state.table + i_bh.to(tl.int64) * (D * D), state.totals + i_bh.to(tl.int64) * D
    width = BLOCK_D + zero
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
        acc = tl.dot(phi, load_part(table, first, D, BLOCK_D, COLUMNS, False), acc, input_precision="ieee")
    return acc, of_total, unit


@triton.jit
def unit_rows(b_q, D: tl.constexpr, MAP: tl.constexpr):
    """phi(q) in the dtype of q, each row divided by its sum, so that products stay in the range of half precision."""
    phi = mapped(b_q, D, MAP)
    size = tl.sum(phi, 1)
    return (phi * (1.0 / tl.where(size > 0.0, size, 1.0))[:, None]).to(b_q.dtype)


@triton.jit
def linear_sums(
    q, k, v, rows, valid, i_bh, i_q, routes, layout, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, MARGINAL: tl.constexpr,
):  # fmt: skip
    """A query block's linear branch over some of its key blocks, see `over_blocks`, and its sums of weights.

    fp32 [BLOCK_Q, BLOCK_D] and [BLOCK_Q]; q is the `HeadRows` of the head.
    """
    k_rows = from_row(rows_of_head(k, i_bh, heads, ALIGN), layout.segments.visual_start)
    v_rows = from_row(rows_of_head(v, i_bh, heads, ALIGN), layout.segments.visual_start)
    selected = routes_of(routes, i_bh, i_q, layout.queries.blocks)
    phi = unit_rows(load_rows(q, rows, valid, D, BLOCK_D), D, MAP)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    weights = tl.zeros([BLOCK_Q], dtype=tl.float32)
    return over_blocks(
        acc, weights, phi, k_rows, v_rows, selected, layout.keys,
        D, BLOCK_D, BLOCK_K, TILE_K, STEP, MAP, MARGINAL, False,
    )  # fmt: skip


@kernel
def sparse_linear_fwd_kernel(
    out, q, k, v, state, weight, bias, routes, lists, saved, layout, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, SCOPE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] of one query block of one head; for training also what the backward reads.

    Args:
        q, k, v: `Heads`; q holds the visual tokens only, k and v all tokens.
        state: a `StateTable` over all visual keys; in scope "all" it includes the projection.
        routes, saved, layout: `Routes`, `SavedBranches` and `TokenLayout`.
        lists: `Lists` of the critical blocks and of those behind the visual ones, which are attended exactly. Key
            blocks are taken in steps of STEP rows.
    """
    queries, keys, tokens = layout.queries, layout.keys, layout.queries.tokens
    visual_start, conditioning_start, text_start, text_lens = layout.segments
    if SCOPE == "marginal":
        zero, i_bh, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
        q_rows = rows_of_head(q, i_bh, heads, ALIGN)
        acc, left = linear_sums(
            q_rows, k, v, rows, valid, i_bh, tl.program_id(0) + zero, routes, layout, heads,
            D, BLOCK_D, ALIGN, BLOCK_Q, BLOCK_K, TILE_K, STEP, MAP, False,
        )  # fmt: skip
        zero, i_bh, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
        q_rows = rows_of_head(q, i_bh, heads, ALIGN)
        peak = tl.load(state.peaks + i_bh)
        acc, of_all, size = with_state(
            acc * (-1.0 / peak), q_rows, rows, valid, state, i_bh, zero, D, BLOCK_D, BLOCK_Q, MAP, True
        )  # fmt: skip
        acc *= peak
        lost = valid & (2.0 * left > of_all)
        left = tl.maximum(of_all - left, 0.0)
        one_by_one = tl.max(lost.to(tl.int32), 0) > 0
        if one_by_one:
            acc, left = linear_sums(
                q_rows, k, v, rows, valid, i_bh, tl.program_id(0) + zero, routes, layout, heads,
                D, BLOCK_D, ALIGN, BLOCK_Q, BLOCK_K, TILE_K, STEP, MAP, True,
            )  # fmt: skip
        denominator = left + EPS / size
        b_l = (acc * (1.0 / denominator)[:, None]).to(q.start.dtype.element_ty)
        if saved.training:
            store_rows(saved.linear, rows, valid, b_l, heads, tokens, D, BLOCK_D)
            tl.store(saved.denominators + i_bh.to(tl.int64) * tokens + rows, denominator * size, mask=valid)
            tl.store(saved.modes + i_bh * queries.blocks + tl.program_id(0), tl.where(one_by_one, 1, 0))
        # the linear branch waits in the output: its registers are needed for the exact branch
        acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        acc = times_table(b_l, weight, acc, D, BLOCK_D, True)
        store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)

    _, i_bh, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
    k_rows = rows_of_head(k, i_bh, heads, ALIGN)
    v_rows = rows_of_head(v, i_bh, heads, ALIGN)
    q_rows = rows_of_head(q, i_bh, heads, ALIGN)
    b_q, base_2 = with_positive_scale(load_rows(q_rows, rows, valid, D, BLOCK_D), scale)
    listed = key_list(i_bh * queries.blocks + tl.program_id(0), lists)
    segments = SegmentRows(visual_start, conditioning_start, text_start, tl.load(text_lens + i_bh // heads))
    acc, m, l = over_key_lists(  # noqa: E741
        Query(b_q, None, None, None), k_rows, v_rows, base_2, listed, lists.words, segments, keys,
        D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, STEP, False, False,
    )  # fmt: skip
    acc, b_lse = finalize(acc, m, l)
    zero, i_bh, rows, valid = recomputed_queries(lists.spans, queries, BLOCK_Q, TILE_Q)
    if saved.training:
        store_rows(saved.exact, rows, valid, acc, heads, tokens, D, BLOCK_D)
        tl.store(saved.lse + i_bh.to(tl.int64) * tokens + rows, b_lse, mask=valid)
    if SCOPE == "marginal":
        acc += stored_rows(out, rows, valid, heads, tokens, D, BLOCK_D)
    else:
        q_rows = rows_of_head(q, i_bh, heads, ALIGN)
        acc_l = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        acc_l, of_total, _ = with_state(
            acc_l, q_rows, rows, valid, state, i_bh, zero, D, BLOCK_D, BLOCK_Q, MAP, False
        )  # fmt: skip
        acc += acc_l * (tl.load(state.peaks + i_bh) / (of_total + EPS))[:, None]
    if HAS_BIAS:
        o_d = tl.arange(0, BLOCK_D)
        acc += tl.load(bias + o_d, mask=o_d < D, other=0.0)[None, :]
    store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)
