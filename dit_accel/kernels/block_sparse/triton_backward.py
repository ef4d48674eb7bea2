"""The backward kernels: dq and delta over the lists, dk and dv over their transpose. Every sum has one fixed order.

ds = p * (dp - delta) with delta = rowsum(out * grad_out) - grad_lse of every query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import load_both
from dit_accel.kernels.block_sparse.triton_tokens import (
    RUNTIME,
    block_at,
    held_at,
    holds,
    list_of,
    load_rows,
    load_words,
    locate,
    places_in,
    rows_at,
    rows_of,
    starts_of,
    store_rows,
)

# The LSE was rounded in base e, so logits and LSE are subtracted in base e. The difference is then taken to base 2.
LOG2E = tl.constexpr(1.4426950408889634)


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
def of_queries(
    b_q, b_g, b_lse, b_delta, k, v, scale, lists, words, starts, grid, conditioning, text_len,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, CUT: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq / scale of a query block, fp32 [BLOCK_Q, BLOCK_D]. Padding keys are loaded as 0 and so add nothing.

    b_g is the gradient of the output; other arguments as in `triton_forward.attend_lists`.
    """
    BLOCK_K: tl.constexpr = CUT[0]
    list_row, pure, _clean, tabled, count, number = lists
    visual_start = starts[0]
    T, H, W = grid
    slot_q = tl.arange(0, BLOCK_Q)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_K // STEP
    # Visual blocks: whole ones, then partial ones, whose padding slots have the row of another token.
    for MASKED in tl.static_range(1 + HAS_TABLES):
        end = (tabled if MASKED else pure) * STEPS
        place = tl.load(list_row + pure * MASKED, mask=pure * STEPS * MASKED < end, other=0)
        for i in range(pure * STEPS * MASKED, end):
            slot_k = i % STEPS * STEP
            place_k = places_in(slot_k + tl.arange(0, STEP), H, W, CUT[2], CUT[3])
            first = visual_start + place
            place = tl.load(list_row + (i + 1) // STEPS, mask=i + 1 < end, other=0)
            if MASKED:
                rows, first = tl.minimum(first + place_k, visual_start + T * H * W - 1).to(tl.int64), 0
            else:
                rows, first = place_k.to(tl.int64), first.to(tl.int64)
            b_k, b_v = load_both(k, v, rows, first, D, BLOCK_D, False, True)  # [STEP, BLOCK_D] and [BLOCK_D, STEP]
            exponent = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_lse[:, None]
            if MASKED:
                low, high = load_words(words, number + i // STEPS - pure, slot_q, slot_k, None, STEP, BLOCK_Q, BLOCK_K)
                seen = holds(low[:, None], high[:, None], tl.arange(0, STEP)[None, :], STEP)
                exponent = tl.where(seen, exponent, float("-inf"))
            ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision=PRECISION) - b_delta[:, None])
            acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)

    for i in range(tabled * STEPS, count * STEPS):
        slot_k = i % STEPS * STEP
        where = block_at(
            tl.load(list_row + i // STEPS), starts, T, H, W, conditioning, text_len, BLOCK_K, CUT[1], CUT[2], CUT[3]
        )  # fmt: skip
        rows = rows_at(where, visual_start, slot_k + tl.arange(0, STEP), H, W, CUT[2], CUT[3])
        b_k, b_v = load_both(k, v, rows, 0, D, BLOCK_D, False, True)
        low = held_at(where, slot_k, T, H, W, CUT[1], CUT[2], CUT[3])
        high = held_at(where, slot_k + 64, T, H, W, CUT[1], CUT[2], CUT[3]) if STEP > 64 else low
        seen = holds(low, high, tl.arange(0, STEP)[None, :], STEP)
        exponent = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_lse[:, None]
        exponent = tl.where(seen, exponent, float("-inf"))
        ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision=PRECISION) - b_delta[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def of_keys(
    b_k, b_v, slot_k, q, grad_out, lse, delta, scale, places, numbers, p_first, words, starts, grid, conditioning, text,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of ROWS rows of a key block, fp32 [ROWS, BLOCK_D], over the query blocks that visit it.

    Args:
        b_k, b_v: [ROWS, BLOCK_D], of `slot_k` [ROWS].
        q, grad_out: where this head's rows begin, and the distance from row to row.
        lse, delta: of this head.
        places, numbers, p_first: `triton_lists.Transposed`, and where this key block's first part begins.
        starts, grid, conditioning, text: of the queries.
        CUT: BLOCK_Q and the tile of a query block, which is taken in steps of STEP rows.
    """
    BLOCK_Q: tl.constexpr = CUT[0]
    visual_start = starts[0]
    T, H, W = grid
    b_dk = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_Q // STEP
    for BOUNDED in tl.static_range(2):  # blocks of visual queries without padding slots, then the others
        for i in range(tl.load(p_first + BOUNDED) * STEPS, tl.load(p_first + BOUNDED + 1) * STEPS):
            slot_q = i % STEPS * STEP + tl.arange(0, STEP)
            block = tl.load(places + i // STEPS)
            if BOUNDED:
                where = block_at(block, starts, T, H, W, conditioning, text, BLOCK_Q, CUT[1], CUT[2], CUT[3])
                rows_q = rows_at(where, visual_start, slot_q, H, W, CUT[2], CUT[3])
                first, place_q = 0, rows_q
            else:
                place_q = places_in(slot_q, H, W, CUT[2], CUT[3]).to(tl.int64)
                first = (visual_start + block).to(tl.int64)
                rows_q = first + place_q
            b_q, b_g = load_both(q, grad_out, place_q, first, D, BLOCK_D, False, False)  # [STEP, BLOCK_D]
            b_g = b_g.to(b_k.dtype)
            b_lse, b_delta = row_statistics(lse, delta, rows_q, None)
            if BOUNDED:  # padding slots get weights of 0
                step = i % STEPS * STEP
                low = held_at(where, step, T, H, W, CUT[1], CUT[2], CUT[3])
                high = held_at(where, step + 64, T, H, W, CUT[1], CUT[2], CUT[3]) if STEP > 64 else low
                b_lse = tl.where(holds(low, high, tl.arange(0, STEP), STEP), b_lse, float("inf"))
            exponent = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale - b_lse[None, :]
            if HAS_TABLES:
                number = tl.load(numbers + i // STEPS)
                low, high = load_words(words, number, slot_q, 0, number >= 0, BLOCK_K, BLOCK_Q, BLOCK_K)
                seen = holds(low[None, :], high[None, :], slot_k[:, None], BLOCK_K)
                exponent = tl.where(seen, exponent, float("-inf"))
            weights = tl.exp2(exponent * LOG2E)  # [ROWS, STEP]
            b_dv = tl.dot(weights.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
            ds = weights * (tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) - b_delta[None, :])
            b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=RUNTIME)
def block_sparse_bwd_kernel_dq(
    q, k, v, grad_out, out, grad_lse, lse, delta, dq,
    places, spans, words,
    visual_starts, conditioning_starts, text_starts, text_lens,
    usual_visual, usual_conditioning, usual_text, usual_length, given,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, o_batch, o_head, o_row,
    scale,
    T, H, W, QT, QH, QW, conditioning, query_conditioning, query_text,
    heads, query_tokens, query_blocks, width, per_head, own_queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, Nq, H, D] of one query block of one head. Padding keys are loaded as 0 and so add nothing.

    A key block is taken in steps of STEP rows. Also writes delta [B, H, Nq], fp32, which the kernel of dk and dv reads
    for the rows of the same blocks.
    """
    i_q = query_blocks - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    starts, text_len = starts_of(
        i_bh // heads, visual_starts, conditioning_starts, text_starts, text_lens,
        (usual_visual, usual_conditioning, usual_text, usual_length), given,
    )  # fmt: skip
    visual_start, conditioning_start, text_start = starts
    slot_q = tl.arange(0, BLOCK_Q)
    rows, valid, _raster = locate(
        i_q, slot_q, visual_start * (1 - own_queries), conditioning_start, text_start, QT, QH, QW,
        query_conditioning, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
    )  # fmt: skip
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_g = load_rows(rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_o = load_rows(rows_of(out, (o_batch, o_head, o_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    place = i_bh.to(tl.int64) * query_tokens + rows
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + place, mask=valid, other=0.0)
    tl.store(delta + place, b_delta, mask=valid)

    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    acc = of_queries(
        b_q, b_g.to(b_q.dtype), row_lse(lse, place, valid), b_delta,
        rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows_of(v, (v_batch, v_head, v_row), heads, ALIGN), scale,
        list_of(i_bh * per_head * query_blocks + i_q, places, spans, width), words, starts, (T, H, W),
        conditioning, text_len, D, BLOCK_D, BLOCK_Q, CUT, STEP, HAS_TABLES, PRECISION,
    )  # fmt: skip

    # Recomputed from the grid to shorten the live range of `rows`; otherwise they spill.
    rows, valid, _raster = locate(
        tl.num_programs(0) - 1 - tl.program_id(0), slot_q, visual_start * (1 - own_queries), conditioning_start,
        text_start, QT, QH, QW, query_conditioning, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
    )  # fmt: skip
    store_rows(dq, rows, valid, acc * scale, heads, query_tokens, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def block_sparse_bwd_kernel_dkdv(
    q, k, v, grad_out, lse, delta, dk, dv,
    places, numbers, firsts, words,
    visual_starts, conditioning_starts, text_starts, text_lens,
    usual_visual, usual_conditioning, usual_text, usual_length, given,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    scale,
    T, H, W, QT, QH, QW, conditioning, query_conditioning, query_text,
    heads, query_tokens, key_tokens, key_blocks, per_head, own_queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of one key block of one head, over the query blocks that visit it.

    `places` and `numbers` list them and their words (`triton_lists.Transposed`). A query block is taken in steps of
    STEP rows. Padding keys need no mask: their rows of dk and dv are not stored.
    """
    i_k = key_blocks - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    starts, text_len = starts_of(
        i_bh // heads, visual_starts, conditioning_starts, text_starts, text_lens,
        (usual_visual, usual_conditioning, usual_text, usual_length), given,
    )  # fmt: skip
    visual_start, conditioning_start, text_start = starts
    slot_k = tl.arange(0, BLOCK_K)
    rows, valid, _raster = locate(
        i_k, slot_k, visual_start, conditioning_start, text_start, T, H, W,
        conditioning, text_len, BLOCK_K, TILE_KT, TILE_KH, TILE_KW,
    )  # fmt: skip
    b_k = load_rows(rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_v = load_rows(rows_of(v, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)

    CUT: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    query_starts = (visual_start * (1 - own_queries), conditioning_start, text_start)
    p_first = firsts + i_bh * per_head * (2 * key_blocks + 1) + 2 * i_k
    first_row = i_bh.to(tl.int64) * query_tokens
    b_dk, b_dv = of_keys(
        b_k, b_v, slot_k, rows_of(q, (q_batch, q_head, q_row), heads, ALIGN),
        rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN), lse + first_row, delta + first_row, scale,
        places, numbers, p_first, words, query_starts, (QT, QH, QW), query_conditioning, query_text,
        D, BLOCK_D, BLOCK_K, BLOCK_K, CUT, STEP, HAS_TABLES, PRECISION,
    )  # fmt: skip

    # Recomputed, as in the dq kernel. Text that is no key has gradients of 0.
    rows, there, _raster = locate(
        tl.num_programs(0) - 1 - tl.program_id(0), slot_k, visual_start, conditioning_start, text_start, T, H, W,
        conditioning, usual_length, BLOCK_K, TILE_KT, TILE_KH, TILE_KW,
    )  # fmt: skip
    valid = there & ((rows < text_start + text_len) | (rows >= text_start + usual_length))
    store_rows(dk, rows, there, tl.where(valid[:, None], b_dk * scale, 0.0), heads, key_tokens, D, BLOCK_D)
    store_rows(dv, rows, there, tl.where(valid[:, None], b_dv, 0.0), heads, key_tokens, D, BLOCK_D)
