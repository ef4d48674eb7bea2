"""The forward kernel: one program a query block, online softmax over its list of key blocks.

`over_key_lists` walks a list for the forward kernel and for the kernel of dq.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import (
    LOG2E,
    corner_of,
    holds,
    key_list,
    load_rows,
    load_words,
    occupied,
    places_in,
    program_queries,
    program_queries_again,
    rows_at,
    rows_of_head,
    store_rows_of_head,
)
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import Query

PEAK = tl.constexpr(4)  # with 8 bits the largest weight of a step is 2^PEAK, far above fp16's subnormal numbers


@triton.jit
def online_softmax_step(acc, m, l, x, scale, b_v):  # noqa: E741
    """Equation (5) in base 2. `x` times `scale` are the logits, -inf where a pair is not allowed; m is scaled.

    The scale is above 0, so the maximum is taken before scaling, and one multiply-add scales and subtracts.
    """
    new_m = tl.maximum(m, tl.max(x, 1) * scale)
    # A row without keys so far has m = -inf. Any finite value here keeps its weights at exp2(-inf) = 0.
    finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    rescale = tl.exp2(m - finite_m)
    p = tl.exp2(x * scale - finite_m[:, None])
    new_l = l * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_m, new_l


@triton.jit
def online_softmax_step_8(acc, m, l, x, scale, b_v):  # noqa: E741
    """`online_softmax_step` with a scale for each row, fp16 values, and fp16 sums over the keys of the step.

    Values are below 2^(PEAK + 1) in magnitude, so the sums over 64 keys are below 2^15. l and acc are 2^PEAK as large.
    """
    new_m = tl.maximum(m, tl.max(x, 1) * scale)
    finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    rescale = tl.exp2(m - finite_m)
    p = tl.exp2(x * scale[:, None] - (finite_m - PEAK)[:, None])
    new_l = l * rescale + tl.sum(p, 1)
    step = tl.dot(p.to(tl.float16), b_v, out_dtype=tl.float16)
    return acc * rescale[:, None] + step.to(tl.float32), new_m, new_l


@triton.jit
def finalize(acc, m, l):  # noqa: E741
    """Equation (6): output, and LSE in base e; 0 and -inf where a row has no key."""
    empty = l == 0.0
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    return acc, tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) / LOG2E)


@triton.jit
def pointers_to(x, rows, first, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to rows of one head, [ROWS, BLOCK_D] or TRANSPOSED, counted from row `first`."""
    o_d = tl.arange(0, BLOCK_D)
    if TRANSPOSED:
        pointers = x.start + rows[None, :] * x.distance + o_d[:, None]
    else:
        pointers = x.start + rows[:, None] * x.distance + o_d[None, :]
    return pointers + first * x.distance


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
def scale_of(query, k, row, scale):
    """The scale of the logits of a key block whose first token has this row."""
    if query.q.dtype == tl.int8:
        scale = scale * tl.load(k.steps + row)
    return scale


@triton.jit
def scores_of(query, b_k, scale, GRADIENT: tl.constexpr):
    """q k before scaling; for gradients the exponents of (3): x - lse."""
    if GRADIENT:
        scores = tl.dot(query.q, tl.trans(b_k), input_precision="ieee") * scale - query.lse[:, None]
    elif query.q.dtype == tl.int8:
        scores = tl.dot(query.q, b_k).to(tl.float32)  # int32 sums, below 2^24
    else:
        scores = tl.dot(query.q, b_k, input_precision="ieee")
    return scores


@triton.jit
def add_keys(sums, query, scores, b_k, b_v, scale, GRADIENT: tl.constexpr):
    """The sums of `over_key_lists` with the keys of one step."""
    if GRADIENT:
        p = tl.exp2(scores * LOG2E)
        ds = p * (tl.dot(query.grad_out, b_v, input_precision="ieee") - query.delta[:, None])
        sums = (tl.dot(ds.to(b_k.dtype), b_k, sums[0], input_precision="ieee"),)
    else:
        acc, m, l = sums  # noqa: E741
        if query.q.dtype == tl.int8:
            sums = online_softmax_step_8(acc, m, l, scores, scale, b_v)
        else:
            sums = online_softmax_step(acc, m, l, scores, scale, b_v)
    return sums


@triton.jit
def over_key_lists(
    query, k, v, scale, listed, words, segments, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A query block over its list.

    Args:
        query: a `Query`, [BLOCK_Q, BLOCK_D], 0 beyond D.
        k, v: `HeadRows` of this head; keys in 8 bits are `KeyRows`.
        scale: of the logits: above 0 and in base 2, or for gradients in base e. Queries in 8 bits have one
            each, [BLOCK_Q].
        listed: this query block's `KeyList`; `words` are those of `triton_tokens`.
        segments, keys: of this sample's keys. A key block is taken in steps of STEP rows.

    Returns:
        acc, m (scaled, in base 2) and l of equation (5); for the GRADIENT dq / scale alone. All fp32.
    """
    STEPS: tl.constexpr = BLOCK_K // STEP
    slot_q = tl.arange(0, BLOCK_Q)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_Q], dtype=tl.float32)  # noqa: E741
    sums = (acc,) if GRADIENT else (acc, m, l)
    # Visual blocks: whole ones, then partial ones, whose padding slots have the row of another token.
    for MASKED in tl.static_range(1 + HAS_TABLES):
        end = (listed.tabled if MASKED else listed.pure) * STEPS
        place = tl.load(listed.places + listed.pure * MASKED, mask=listed.pure * STEPS * MASKED < end, other=0)
        for i in range(listed.pure * STEPS * MASKED, end):
            slot_k = i % STEPS * STEP
            place_k = places_in(slot_k + tl.arange(0, STEP), keys, TILE_K)
            first = segments.visual_start + place
            block_scale = scale_of(query, k, first, scale)
            place = tl.load(listed.places + (i + 1) // STEPS, mask=i + 1 < end, other=0)
            if MASKED:
                last = segments.visual_start + keys.T * keys.H * keys.W - 1
                rows, first = tl.minimum(first + place_k, last).to(tl.int64), 0
            else:
                rows, first = place_k.to(tl.int64), first.to(tl.int64)
            # forward [BLOCK_D, STEP] and [STEP, BLOCK_D], for gradients the other way round
            b_k, b_v = load_both(k, v, rows, first, D, BLOCK_D, not GRADIENT, GRADIENT)
            scores = scores_of(query, b_k, block_scale, GRADIENT)
            if MASKED:
                number = listed.number + i // STEPS - listed.pure
                low, high = load_words(words, number, slot_q, slot_k, None, STEP, BLOCK_Q, BLOCK_K)
                seen = holds(low[:, None], high[:, None], tl.arange(0, STEP)[None, :], STEP)
                scores = tl.where(seen, scores, float("-inf"))
            sums = add_keys(sums, query, scores, b_k, b_v, block_scale, GRADIENT)

    for i in range(listed.tabled * STEPS, listed.count * STEPS):
        slot_k = i % STEPS * STEP
        corner = corner_of(tl.load(listed.places + i // STEPS), segments, keys, BLOCK_K, TILE_K)
        block_scale = scale_of(query, k, corner.first + corner.place, scale)
        rows = rows_at(corner, segments.visual_start, slot_k + tl.arange(0, STEP), keys, TILE_K)
        b_k, b_v = load_both(k, v, rows, 0, D, BLOCK_D, not GRADIENT, GRADIENT)
        low = occupied(corner, slot_k, keys, TILE_K)
        high = occupied(corner, slot_k + 64, keys, TILE_K) if STEP > 64 else low
        seen = holds(low, high, tl.arange(0, STEP)[None, :], STEP)
        scores = tl.where(seen, scores_of(query, b_k, block_scale, GRADIENT), float("-inf"))
        sums = add_keys(sums, query, scores, b_k, b_v, block_scale, GRADIENT)
    return sums


@triton.jit
def with_positive_scale(b_q, scale):
    """Queries and a scale in base 2 that give the same logits; `online_softmax_step` needs a scale above 0."""
    # The scale's sign is moved into q. A scale of 0 becomes 1, with q = 0.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return b_q * sign.to(b_q.dtype), tl.where(scale == 0, 1.0, tl.abs(scale)) * LOG2E


@triton.jit
def attend_lists(
    q, k, v, lists, samples, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr,
):  # fmt: skip
    """`over_key_lists` for this program's query block, arguments as in `block_sparse_fwd_kernel`.

    Returns acc, m, l; queries and scale of `with_positive_scale`; query block, head, and the segments of queries.
    """
    i_q, i_bh, segments, starts, rows, valid = program_queries(samples, queries, heads, BLOCK_Q, TILE_Q)
    b_q, base_2 = with_positive_scale(load_rows(rows_of_head(q, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D), scale)
    acc, m, l = over_key_lists(  # noqa: E741
        Query(b_q, None, None, None),
        rows_of_head(k, i_bh, heads, ALIGN), rows_of_head(v, i_bh, heads, ALIGN), base_2,
        key_list(i_bh * lists.per_head * queries.blocks + i_q, lists), lists.words, segments, keys,
        D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, STEP, HAS_TABLES, False,
    )  # fmt: skip
    return acc, m, l, b_q, base_2, i_q, i_bh, starts


@triton.jit
def store_output(
    out, acc, m, l, starts, queries, heads,  # noqa: E741
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    """Store the output of this program's query block. Returns its LSE; where its head begins there; rows, validity."""
    acc, b_lse = finalize(acc, m, l)
    i_bh, rows, valid = program_queries_again(starts, queries, BLOCK_Q, TILE_Q)
    store_rows_of_head(out, rows, valid, acc, i_bh, heads, queries.tokens, D, BLOCK_D)
    return b_lse, i_bh.to(tl.int64) * queries.tokens, rows, valid


@kernel
def block_sparse_fwd_kernel(
    out, q, k, v, lse, lists, samples, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of one query block of one head.

    Args:
        q, k, v: `Heads`.
        lists, samples: `Lists` and `SampleSegments`.
        keys, queries: a `Side` each.
    """
    acc, m, l, _q, _scale, _i_q, _i_bh, starts = attend_lists(  # noqa: E741
        q, k, v, lists, samples, keys, queries, scale, heads,
        D, BLOCK_D, ALIGN, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, STEP, HAS_TABLES,
    )  # fmt: skip
    b_lse, first, rows, valid = store_output(out, acc, m, l, starts, queries, heads, D, BLOCK_D, BLOCK_Q, TILE_Q)
    tl.store(lse + first + rows, b_lse, mask=valid)
