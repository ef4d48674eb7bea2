"""The backward kernels: dq and delta over the lists, dk and dv over their transpose. Every sum has one fixed order.

ds = p * (dp - delta) with delta = rowsum(out * grad_out) - grad_lse of every query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import load_both, over_key_lists
from dit_accel.kernels.block_sparse.triton_tokens import (
    LOG2E,
    corner_of,
    holds,
    key_list,
    load_rows,
    load_words,
    locate,
    occupied,
    places_in,
    program_block,
    program_queries,
    program_queries_again,
    query_segments,
    rows_at,
    rows_of_head,
    segments_of,
    store_rows_of_head,
)
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import Query, SegmentRows

# The LSE was rounded in base e, so logits and LSE are subtracted in base e. The difference is then taken to base 2.


@triton.jit
def row_lse(lse, place, valid):
    """LSE of query rows. Rows without keys, and those not `valid` (None: all are), get weights of 0."""
    if valid is None:
        b_lse = tl.load(lse + place)
    else:
        b_lse = tl.load(lse + place, mask=valid, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def row_statistics(lse, delta, place, valid):
    """LSE, as `row_lse` gives it, and delta of query rows."""
    if valid is None:
        b_delta = tl.load(delta + place)
    else:
        b_delta = tl.load(delta + place, mask=valid, other=0.0)
    return row_lse(lse, place, valid), b_delta


@triton.jit
def over_query_lists(
    b_k, b_v, slot_k, q, grad_out, lse, delta, scale, visits, p_first, segments, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, STEP: tl.constexpr, HAS_TABLES: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of ROWS rows of a key block, fp32 [ROWS, BLOCK_D], over the query blocks that visit it.

    Args:
        b_k, b_v: [ROWS, BLOCK_D], of `slot_k` [ROWS].
        q, grad_out: `HeadRows` of this head.
        lse, delta: of this head.
        visits, p_first: `Visits`, and where this key block's first part begins.
        segments, queries: of this sample's queries. A query block is taken in steps of STEP rows.
    """
    b_dk = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_Q // STEP
    for BOUNDED in tl.static_range(2):  # blocks of visual queries without padding slots, then the others
        part = tl.load(p_first + BOUNDED)  # counts entries of all heads: times STEPS it may not fit in 32 bits
        for i in range((tl.load(p_first + BOUNDED + 1) - part) * STEPS):
            slot_q = i % STEPS * STEP + tl.arange(0, STEP)
            block = tl.load(visits.places + part + i // STEPS)
            if BOUNDED:
                corner = corner_of(block, segments, queries, BLOCK_Q, TILE_Q)
                rows_q = rows_at(corner, segments.visual_start, slot_q, queries, TILE_Q)
                first, place_q = 0, rows_q
            else:
                place_q = places_in(slot_q, queries, TILE_Q).to(tl.int64)
                first = (segments.visual_start + block).to(tl.int64)
                rows_q = first + place_q
            b_q, b_g = load_both(q, grad_out, place_q, first, D, BLOCK_D, False, False)  # [STEP, BLOCK_D]
            b_g = b_g.to(b_k.dtype)
            b_lse, b_delta = row_statistics(lse, delta, rows_q, None)
            if BOUNDED:  # padding slots get weights of 0
                step = i % STEPS * STEP
                low = occupied(corner, step, queries, TILE_Q)
                high = occupied(corner, step + 64, queries, TILE_Q) if STEP > 64 else low
                b_lse = tl.where(holds(low, high, tl.arange(0, STEP), STEP), b_lse, float("inf"))
            exponents = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :]
            if HAS_TABLES:
                number = tl.load(visits.numbers + part + i // STEPS)
                low, high = load_words(visits.words, number, slot_q, 0, number >= 0, BLOCK_K, BLOCK_Q, BLOCK_K)
                seen = holds(low[None, :], high[None, :], slot_k[:, None], BLOCK_K)
                exponents = tl.where(seen, exponents, float("-inf"))
            p = tl.exp2(exponents * LOG2E)  # [ROWS, STEP]
            b_dv = tl.dot(p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
            ds = p * (tl.dot(b_v, tl.trans(b_g), input_precision="ieee") - b_delta[None, :])
            b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@kernel
def block_sparse_bwd_kernel_dq(
    dq, q, k, v, grad_out, out, grad_lse, lse, delta, lists, samples, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """dq [B, Nq, H, D] of one query block of one head; arguments as in the forward kernel, grad_out and out `Heads`.

    Padding keys are loaded as 0 and so add nothing. Also writes delta [B, H, Nq], fp32, which the kernel of dk and dv
    reads for the rows of the same blocks.
    """
    i_q, i_bh, segments, starts, rows, valid = program_queries(samples, queries, heads, BLOCK_Q, TILE_Q)
    b_q = load_rows(rows_of_head(q, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_g = load_rows(rows_of_head(grad_out, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_o = load_rows(rows_of_head(out, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    place = i_bh.to(tl.int64) * queries.tokens + rows
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + place, mask=valid, other=0.0)
    tl.store(delta + place, b_delta, mask=valid)

    sums = over_key_lists(
        Query(b_q, b_g.to(b_q.dtype), row_lse(lse, place, valid), b_delta),
        rows_of_head(k, i_bh, heads, ALIGN), rows_of_head(v, i_bh, heads, ALIGN), scale,
        key_list(i_bh * lists.per_head * queries.blocks + i_q, lists), lists.words, segments, keys,
        D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, STEP, HAS_TABLES, True,
    )  # fmt: skip
    i_bh, rows, valid = program_queries_again(starts, queries, BLOCK_Q, TILE_Q)
    store_rows_of_head(dq, rows, valid, sums[0] * scale, i_bh, heads, queries.tokens, D, BLOCK_D)


@kernel
def block_sparse_bwd_kernel_dkdv(
    dk, dv, q, k, v, grad_out, lse, delta, visits, samples, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of one key block of one head, over the query blocks that visit it.

    `visits` are `Visits`; other arguments as in the dq kernel. A query block is taken in steps of STEP rows. Padding
    keys need no mask: their rows of dk and dv are not stored.
    """
    i_k, i_bh = program_block(keys.blocks, keys, BLOCK_K)
    segments = segments_of(i_bh // heads, samples)
    slot_k = tl.arange(0, BLOCK_K)
    rows, valid, _raster = locate(i_k, slot_k, segments, keys, BLOCK_K, TILE_K)
    b_k = load_rows(rows_of_head(k, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_v = load_rows(rows_of_head(v, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)

    p_first = visits.firsts + i_bh * visits.per_head * (2 * keys.blocks + 1) + 2 * i_k
    first_row = i_bh.to(tl.int64) * queries.tokens
    b_dk, b_dv = over_query_lists(
        b_k, b_v, slot_k, rows_of_head(q, i_bh, heads, ALIGN), rows_of_head(grad_out, i_bh, heads, ALIGN),
        lse + first_row, delta + first_row, scale, visits, p_first,
        query_segments(segments, samples, queries.text), queries,
        D, BLOCK_D, BLOCK_K, BLOCK_K, BLOCK_Q, TILE_Q, STEP, HAS_TABLES,
    )  # fmt: skip

    # Recomputed, as in `program_queries_again`. Text that is no key has gradients of 0.
    visual_start, conditioning_start, text_start, text_len = segments
    padded = SegmentRows(visual_start, conditioning_start, text_start, keys.text)
    i_k, i_bh = program_block(tl.num_programs(0), keys, BLOCK_K)
    rows, there, _raster = locate(i_k, slot_k, padded, keys, BLOCK_K, TILE_K)
    valid = there & ((rows < text_start + text_len) | (rows >= text_start + keys.text))
    store_rows_of_head(
        dk, rows, there, tl.where(valid[:, None], b_dk * scale, 0.0), i_bh, heads, keys.tokens, D, BLOCK_D
    )
    store_rows_of_head(dv, rows, there, tl.where(valid[:, None], b_dv, 0.0), i_bh, heads, keys.tokens, D, BLOCK_D)
