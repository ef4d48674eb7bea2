"""The forward kernel: one program a query block, online softmax over its list of key blocks."""

from __future__ import annotations

import triton
import triton.language as tl

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

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def absorb(acc, peak, total, scores, scale, b_v, PRECISION: tl.constexpr):
    """One step of the online softmax in base 2; `scores` are -inf where a pair is not allowed, `peak` is scaled.

    The scale is above 0, so the maximum is taken before scaling, and one multiply-add scales and subtracts.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    # A row without keys so far has peak -inf. Any finite value here keeps its weights at exp2(-inf) = 0.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - safe)
    weights = tl.exp2(scores * scale - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def pointers_to(x, rows, first, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to rows of one head, [ROWS, BLOCK_D] or TRANSPOSED, counted from row `first`."""
    start, distance = x
    o_d = tl.arange(0, BLOCK_D)
    if TRANSPOSED:
        pointers = start + rows[None, :] * distance + o_d[:, None]
    else:
        pointers = start + rows[:, None] * distance + o_d[None, :]
    return pointers + first * distance


@triton.jit
def load_both(x, y, rows, first, D: tl.constexpr, BLOCK_D: tl.constexpr, TURN_X: tl.constexpr, TURN_Y: tl.constexpr):
    """The same rows of one head of x and of y, [ROWS, BLOCK_D] or transposed; all are in memory. 0 beyond D."""
    p_x, p_y = pointers_to(x, rows, first, BLOCK_D, TURN_X), pointers_to(y, rows, first, BLOCK_D, TURN_Y)
    if BLOCK_D == D:
        b_x, b_y = tl.load(p_x), tl.load(p_y)
    else:
        there = tl.arange(0, BLOCK_D) < D
        b_x = tl.load(p_x, mask=there[:, None] if TURN_X else there[None, :], other=0.0)
        b_y = tl.load(p_y, mask=there[:, None] if TURN_Y else there[None, :], other=0.0)
    return b_x, b_y


@triton.jit
def attend_lists(
    b_q, k, v, scale, lists, words, starts, grid, conditioning, text_len,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, CUT: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query block over its list: weighted sums of values, largest logit (scaled, base 2) and sum of weights per row.

    Args:
        b_q: [BLOCK_Q, BLOCK_D], 0 beyond D.
        k, v: where this head's rows begin, and the distance from row to row.
        scale: of the logits, above 0, in base 2.
        lists: `triton_tokens.list_of` this query block; `words` are those of `triton_tokens`.
        starts: of this sample's visual, conditioning and text tokens.
        CUT: BLOCK_K and the tile of a key block, which is taken in steps of STEP rows.
    """
    BLOCK_K: tl.constexpr = CUT[0]
    STEPS: tl.constexpr = BLOCK_K // STEP
    list_row, pure, _clean, tabled, count, number = lists
    visual_start = starts[0]
    T, H, W = grid
    slot_q = tl.arange(0, BLOCK_Q)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
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
            b_k, b_v = load_both(k, v, rows, first, D, BLOCK_D, True, False)  # [BLOCK_D, STEP] and [STEP, BLOCK_D]
            scores = tl.dot(b_q, b_k, input_precision=PRECISION)
            if MASKED:
                low, high = load_words(words, number + i // STEPS - pure, slot_q, slot_k, None, STEP, BLOCK_Q, BLOCK_K)
                seen = holds(low[:, None], high[:, None], tl.arange(0, STEP)[None, :], STEP)
                scores = tl.where(seen, scores, float("-inf"))
            acc, peak, total = absorb(acc, peak, total, scores, scale, b_v, PRECISION)

    for i in range(tabled * STEPS, count * STEPS):
        slot_k = i % STEPS * STEP
        where = block_at(
            tl.load(list_row + i // STEPS), starts, T, H, W, conditioning, text_len, BLOCK_K, CUT[1], CUT[2], CUT[3]
        )  # fmt: skip
        rows = rows_at(where, visual_start, slot_k + tl.arange(0, STEP), H, W, CUT[2], CUT[3])
        b_k, b_v = load_both(k, v, rows, 0, D, BLOCK_D, True, False)
        low = held_at(where, slot_k, T, H, W, CUT[1], CUT[2], CUT[3])
        high = held_at(where, slot_k + 64, T, H, W, CUT[1], CUT[2], CUT[3]) if STEP > 64 else low
        seen = holds(low, high, tl.arange(0, STEP)[None, :], STEP)
        scores = tl.where(seen, tl.dot(b_q, b_k, input_precision=PRECISION), float("-inf"))
        acc, peak, total = absorb(acc, peak, total, scores, scale, b_v, PRECISION)
    return acc, peak, total


@triton.jit
def normalised(acc, peak, total):
    """Output and LSE, in base e, of what `attend_lists` gives; 0 and -inf where a row has no key."""
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    return acc, tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)


@triton.jit
def positive(b_q, scale):
    """Queries and a scale in base 2 that give the same logits; `absorb` needs a scale above 0."""
    # The scale's sign is moved into q. A scale of 0 becomes 1, with q = 0.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return b_q * sign.to(b_q.dtype), tl.where(scale == 0, 1.0, tl.abs(scale)) * LOG2E


@triton.jit(do_not_specialize=RUNTIME)
def block_sparse_fwd_kernel(
    q, k, v, out, lse,
    places, spans, words,
    visual_starts, conditioning_starts, text_starts, text_lens,
    usual_visual, usual_conditioning, usual_text, usual_length, given,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale,
    T, H, W, QT, QH, QW, conditioning, query_conditioning, query_text,
    heads, query_tokens, query_blocks, width, per_head, own_queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of one query block of one head; strides come divided by ALIGN.

    A key block is taken in steps of STEP rows. `words` are those of `triton_tokens`.
    """
    # The last blocks are text rows, whose lists are the longest: start them first.
    i_q = query_blocks - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    starts, text_len = starts_of(
        i_bh // heads, visual_starts, conditioning_starts, text_starts, text_lens,
        (usual_visual, usual_conditioning, usual_text, usual_length), given,
    )  # fmt: skip
    visual_start, conditioning_start, text_start = starts
    rows, valid, _raster = locate(
        i_q, tl.arange(0, BLOCK_Q), visual_start * (1 - own_queries), conditioning_start, text_start, QT, QH, QW,
        query_conditioning, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
    )  # fmt: skip
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_q, scale = positive(b_q, scale)

    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    acc, peak, total = attend_lists(
        b_q, rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows_of(v, (v_batch, v_head, v_row), heads, ALIGN),
        scale, list_of(i_bh * per_head * query_blocks + i_q, places, spans, width), words, starts, (T, H, W),
        conditioning, text_len, D, BLOCK_D, BLOCK_Q, CUT, STEP, HAS_TABLES, PRECISION,
    )  # fmt: skip
    acc, b_lse = normalised(acc, peak, total)
    # Recomputed from the grid to shorten the live range of `rows`; otherwise they spill.
    rows, valid, _raster = locate(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.arange(0, BLOCK_Q), visual_start * (1 - own_queries),
        conditioning_start, text_start, QT, QH, QW, query_conditioning, query_text, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW,
    )  # fmt: skip
    store_rows(out, rows, valid, acc, heads, query_tokens, D, BLOCK_D)
    tl.store(lse + i_bh.to(tl.int64) * query_tokens + rows, b_lse, mask=valid)
