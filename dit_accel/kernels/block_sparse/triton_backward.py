"""The backward kernels: delta, dq over the lists, dk and dv over their transpose. Every sum has one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_predicate import holds, load_words
from dit_accel.kernels.block_sparse.triton_tokens import (
    head_of,
    list_of,
    locate,
    places_in,
    starts_of,
)

# Logits and LSE are subtracted in base e, where the LSE was rounded once, and only then taken to base 2
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["o_batch", "o_head", "o_row", "g_batch", "g_head", "g_row", "heads", "tokens"])
def delta_kernel(
    out, grad_out, grad_lse, delta,
    o_batch, o_head, o_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * grad_out) - grad_lse in fp32 [B, H, N]: ds = p * (dp - delta)."""
    i_b, i_h = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    inside = row < tokens
    mask = inside[:, None] & (o_d < D)
    rows = row.to(tl.int64)[:, None]
    p_o = out + i_b.to(tl.int64) * o_batch + i_h.to(tl.int64) * o_head + rows * o_row + o_d
    p_g = grad_out + i_b.to(tl.int64) * g_batch + i_h.to(tl.int64) * g_head + rows * g_row + o_d
    b_o = tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(b_o * b_g, 1)
    place = tl.program_id(1).to(tl.int64) * tokens + row
    if HAS_GRAD_LSE:
        total -= tl.load(grad_lse + place, mask=inside, other=0.0)
    tl.store(delta + place, total, mask=inside)


@triton.jit
def row_statistics(lse, delta, place, valid):
    """LSE and delta of query rows. Rows without keys, and those not `valid` (None: all are), get weights of 0."""
    if valid is None:
        b_lse, b_delta = tl.load(lse + place), tl.load(delta + place)
    else:
        b_lse = tl.load(lse + place, mask=valid, other=float("inf"))
        b_delta = tl.load(delta + place, mask=valid, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse, b_delta


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row",
    "T", "H", "W", "QT", "QH", "QW", "reference", "query_reference", "query_text",
    "heads", "query_tokens", "query_blocks", "width", "per_head", "own_queries",
])  # fmt: skip
def block_sparse_bwd_kernel_dq(
    q, k, v, grad_out, lse, delta, dq,
    places, spans, words,
    visual_starts, reference_starts, text_starts, text_lens,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    scale,
    T, H, W, QT, QH, QW, reference, query_reference, query_text,
    heads, query_tokens, query_blocks, width, per_head, own_queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, Nq, H, D] of one query block of one head. Padding keys are loaded as 0 and so add nothing.

    A key block is taken in steps of STEP rows.
    """
    i_q = query_blocks - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    visual_start, reference_start, text_start, text_len = starts_of(
        i_b, visual_starts, reference_starts, text_starts, text_lens
    )  # fmt: skip
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    slot_q = tl.arange(0, BLOCK_Q)
    row_q, valid_q, _raster_q = locate(
        i_q, slot_q, visual_start * (1 - own_queries), reference_start, text_start, QT, QH, QW,
        query_reference, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
    )  # fmt: skip
    rows_q = row_q.to(tl.int64)
    mask_q = valid_q[:, None] & m_d
    b_q = tl.load(q + rows_q[:, None] * (q_row * ALIGN) + o_d, mask=mask_q, other=0.0)
    b_g = tl.load(grad_out + rows_q[:, None] * g_row + o_d, mask=mask_q, other=0.0).to(b_q.dtype)
    b_lse, b_delta = row_statistics(lse, delta, i_bh.to(tl.int64) * query_tokens + rows_q, valid_q)

    list_row, pure, clean, tabled, count, number = list_of(
        i_bh * per_head * query_blocks + i_q, places, spans, width
    )  # fmt: skip
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_K // STEP
    for MASKED in tl.static_range(1 + HAS_TABLES):  # visual keys without padding slots: whole blocks, then partial ones
        for i in range(pure * STEPS * MASKED, (clean if MASKED else pure) * STEPS):
            slot_k = i % STEPS * STEP
            place_k = places_in(slot_k + tl.arange(0, STEP), H, W, TILE_KH, TILE_KW).to(tl.int64)
            p_tile_k = k + place_k[:, None] * (k_row * ALIGN) + o_d[None, :]
            p_tile_v = v + place_k[None, :] * (v_row * ALIGN) + o_d[:, None]
            first = (visual_start + tl.load(list_row + i // STEPS)).to(tl.int64)
            if BLOCK_D == D:
                b_k = tl.load(p_tile_k + first * (k_row * ALIGN))  # [STEP, BLOCK_D]
                b_v = tl.load(p_tile_v + first * (v_row * ALIGN))  # [BLOCK_D, STEP]
            else:
                b_k = tl.load(p_tile_k + first * (k_row * ALIGN), mask=m_d[None, :], other=0.0)
                b_v = tl.load(p_tile_v + first * (v_row * ALIGN), mask=m_d[:, None], other=0.0)
            exponent = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_lse[:, None]
            if MASKED:
                low, high = load_words(words, number + i // STEPS - pure, slot_q, slot_k, None, STEP, BLOCK_Q, BLOCK_K)
                seen = holds(low[:, None], high[:, None], tl.arange(0, STEP)[None, :], STEP)
                exponent = tl.where(seen, exponent, float("-inf"))
            ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision=PRECISION) - b_delta[:, None])
            acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)

    for i in range(clean * STEPS, count * STEPS):
        slot_k = i % STEPS * STEP
        row_k, valid_k, _ = locate(
            tl.load(list_row + i // STEPS), slot_k + tl.arange(0, STEP), visual_start, reference_start, text_start,
            T, H, W, reference, text_len, BLOCK_K, TILE_KT, TILE_KH, TILE_KW,
        )  # fmt: skip
        rows = row_k.to(tl.int64)
        p_k = k + rows[:, None] * (k_row * ALIGN) + o_d[None, :]
        p_v = v + rows[None, :] * (v_row * ALIGN) + o_d[:, None]
        b_k = tl.load(p_k, mask=valid_k[:, None] & m_d[None, :], other=0.0)
        b_v = tl.load(p_v, mask=valid_k[None, :] & m_d[:, None], other=0.0)
        exponent = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_lse[:, None]
        # a padding key's logit of 0 may be far above the LSE: its weight must not become infinite
        exponent = tl.where(valid_k[None, :], exponent, float("-inf"))
        if HAS_TABLES:
            j = i // STEPS
            low, high = load_words(words, number + j - pure, slot_q, slot_k, j < tabled, STEP, BLOCK_Q, BLOCK_K)
            seen = holds(low[:, None], high[:, None], tl.arange(0, STEP)[None, :], STEP)
            exponent = tl.where(seen, exponent, float("-inf"))
        ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision=PRECISION) - b_delta[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)

    p_dq = dq + ((i_b.to(tl.int64) * query_tokens + rows_q[:, None]) * heads + i_h) * D + o_d
    tl.store(p_dq, (acc * scale).to(dq.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "g_batch", "g_head", "g_row",
    "T", "H", "W", "QT", "QH", "QW", "reference", "query_reference", "query_text",
    "heads", "query_tokens", "key_tokens", "key_blocks", "per_head", "own_queries",
])  # fmt: skip
def block_sparse_bwd_kernel_dkdv(
    q, k, v, grad_out, lse, delta, dk, dv,
    places, numbers, firsts, words,
    visual_starts, reference_starts, text_starts, text_lens,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    scale,
    T, H, W, QT, QH, QW, reference, query_reference, query_text,
    heads, query_tokens, key_tokens, key_blocks, per_head, own_queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of one key block of one head, over the query blocks that visit it.

    They and their words are listed in `places` and `numbers` (`triton_lists.Transposed`); a query block is taken in
    steps of STEP rows. Padding keys need no mask: each has a row of its own in every product, which is not stored.
    """
    i_k = key_blocks - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    visual_start, reference_start, text_start, text_len = starts_of(
        i_b, visual_starts, reference_starts, text_starts, text_lens
    )  # fmt: skip
    q = head_of(q, i_b, i_h, q_batch, q_head, ALIGN)
    k = head_of(k, i_b, i_h, k_batch, k_head, ALIGN)
    v = head_of(v, i_b, i_h, v_batch, v_head, ALIGN)
    grad_out = head_of(grad_out, i_b, i_h, g_batch, g_head, 1)
    statistics = i_bh.to(tl.int64) * query_tokens

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    slot_k = tl.arange(0, BLOCK_K)
    row_k, valid_k, _ = locate(
        i_k, slot_k, visual_start, reference_start, text_start, T, H, W,
        reference, text_len, BLOCK_K, TILE_KT, TILE_KH, TILE_KW,
    )  # fmt: skip
    rows_k = row_k.to(tl.int64)
    mask_k = valid_k[:, None] & m_d
    b_k = tl.load(k + rows_k[:, None] * (k_row * ALIGN) + o_d, mask=mask_k, other=0.0)
    b_v = tl.load(v + rows_k[:, None] * (v_row * ALIGN) + o_d, mask=mask_k, other=0.0)

    p_first = firsts + i_bh * per_head * (2 * key_blocks + 1) + 2 * i_k
    visual_start *= 1 - own_queries
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_Q // STEP
    for BOUNDED in tl.static_range(2):  # blocks of visual queries without padding slots, then the others
        for i in range(tl.load(p_first + BOUNDED) * STEPS, tl.load(p_first + BOUNDED + 1) * STEPS):
            slot_q = i % STEPS * STEP + tl.arange(0, STEP)
            block = tl.load(places + i // STEPS)
            if BOUNDED:
                row_q, valid_q, _raster_q = locate(
                    block, slot_q, visual_start, reference_start, text_start, QT, QH, QW,
                    query_reference, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
                )  # fmt: skip
                rows_q = row_q.to(tl.int64)
                mask_q = valid_q[:, None] & m_d
                b_q = tl.load(q + rows_q[:, None] * (q_row * ALIGN) + o_d, mask=mask_q, other=0.0)  # [STEP, BLOCK_D]
                b_g = tl.load(grad_out + rows_q[:, None] * g_row + o_d, mask=mask_q, other=0.0).to(b_q.dtype)
                b_lse, b_delta = row_statistics(lse, delta, statistics + rows_q, valid_q)
            else:
                place_q = places_in(slot_q, QH, QW, TILE_QH, TILE_QW).to(tl.int64)
                first = (visual_start + block).to(tl.int64)
                p_q = q + place_q[:, None] * (q_row * ALIGN) + o_d + first * (q_row * ALIGN)
                p_g = grad_out + place_q[:, None] * g_row + o_d + first * g_row
                if BLOCK_D == D:
                    b_q, b_g = tl.load(p_q), tl.load(p_g).to(b_k.dtype)
                else:
                    b_q = tl.load(p_q, mask=m_d[None, :], other=0.0)
                    b_g = tl.load(p_g, mask=m_d[None, :], other=0.0).to(b_k.dtype)
                b_lse, b_delta = row_statistics(lse, delta, statistics + first + place_q, None)
            exponent = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale - b_lse[None, :]
            if HAS_TABLES:
                number = tl.load(numbers + i // STEPS)
                low, high = load_words(words, number, slot_q, 0, number >= 0, BLOCK_K, BLOCK_Q, BLOCK_K)
                seen = holds(low[None, :], high[None, :], slot_k[:, None], BLOCK_K)
                exponent = tl.where(seen, exponent, float("-inf"))
            weights = tl.exp2(exponent * LOG2E)  # [BLOCK_K, STEP]
            b_dv = tl.dot(weights.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
            ds = weights * (tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) - b_delta[None, :])
            b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    place = ((i_b.to(tl.int64) * key_tokens + rows_k[:, None]) * heads + i_h) * D + o_d
    tl.store(dk + place, (b_dk * scale).to(dk.dtype.element_ty), mask=mask_k)
    tl.store(dv + place, b_dv.to(dv.dtype.element_ty), mask=mask_k)
