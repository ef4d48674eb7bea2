"""Kernels of `triton8`: keys and values are quantised once a call, and block-sparse attention runs on them.

Source: SageAttention (arXiv:2410.02367) and SageAttention2 (arXiv:2411.10958): centred keys in 8 bits, values in fp16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_forward import PEAK, finalize, over_key_lists, with_positive_scale
from dit_accel.kernels.block_sparse.triton_tokens import (
    LOG2E,
    corner_of,
    key_list,
    load_rows,
    locate,
    program_queries,
    program_queries_again,
    rows_of_head,
    segments_of,
    store_rows_of_head,
)
from dit_accel.kernels.jit import kernel
from dit_accel.kernels.records import HeadRows, KeyRows, Query

LARGEST = tl.constexpr(127.0)
SMALLEST = tl.constexpr(2.0**-50)  # least step, so that the product of two is no 0, which times -inf is NaN
BLOCKS = tl.constexpr(16)  # blocks of which sums are read at a time
# Bits of fp32: the exponent's place, its bias, and the smallest exponent that is scaled in full (2^-119).
EXPONENT, BIAS, LEAST = tl.constexpr(23), tl.constexpr(127), tl.constexpr(8)


@triton.jit
def quantised(x, factor):
    """x times a factor that makes its largest magnitude 127, to the nearest integer: int8."""
    return tl.floor(x * factor + 0.5).to(tl.int8)


@triton.jit
def steps_of(peak):
    """The factor that turns `peak` into 127, and the size of a step; 0 and SMALLEST where `peak` is below SMALLEST."""
    some = peak >= SMALLEST
    whole = tl.where(some, peak, 1.0)
    limit = tl.zeros_like(whole) + LARGEST
    step = tl.maximum(tl.div_rn(whole, limit), SMALLEST)
    return tl.where(some, tl.div_rn(limit, whole), 0.0), tl.where(some, step, SMALLEST)


@triton.jit
def program_keys(k, v, segments, keys, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
             BLOCK_K: tl.constexpr, TILE_K: tl.constexpr):  # fmt: skip
    """Keys and values of this program's block, fp32 [BLOCK_K, BLOCK_D], and the rows and validity of its slots."""
    i_bh = tl.program_id(1)
    rows, valid, _raster = locate(tl.program_id(0), tl.arange(0, BLOCK_K), segments, keys, BLOCK_K, TILE_K)
    b_k = load_rows(rows_of_head(k, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D).to(tl.float32)
    b_v = load_rows(rows_of_head(v, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D).to(tl.float32)
    return b_k, b_v, rows.to(tl.int64), valid


@kernel
def key_value_sums_kernel(
    sums, k, v, samples, keys, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Of each block the sum of its keys, and its values' largest magnitudes: fp32 [B H, blocks, 2, BLOCK_D]."""
    segments = segments_of(tl.program_id(1) // heads, samples)
    b_k, b_v, _rows, _valid = program_keys(k, v, segments, keys, heads, D, BLOCK_D, ALIGN, BLOCK_K, TILE_K)
    p_sums = sums + (tl.program_id(1).to(tl.int64) * keys.blocks + tl.program_id(0)) * 2 * BLOCK_D
    p_sums += tl.arange(0, BLOCK_D)
    tl.store(p_sums, tl.sum(b_k, 0))
    tl.store(p_sums + BLOCK_D, tl.max(tl.abs(b_v), 0))


@kernel
def key_value_scales_kernel(scales, sums, samples, keys, heads, BLOCK_D: tl.constexpr):
    """Of each head the mean key, the factor of each channel of the values and its inverse: fp32 [B H, 3, BLOCK_D].

    The factors are powers of two, so values keep their digits. They bring the largest magnitude into [2^PEAK,
    2^(PEAK + 1)), see `online_softmax_step_8`.
    """
    i_bh = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    peak = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, keys.blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        p_sums = sums + (i_bh.to(tl.int64) * keys.blocks + block)[:, None] * 2 * BLOCK_D + o_d
        there = (block < keys.blocks)[:, None]
        total += tl.sum(tl.load(p_sums, mask=there, other=0.0), 0)
        peak = tl.maximum(peak, tl.max(tl.load(p_sums + BLOCK_D, mask=there, other=0.0), 0))
    tokens = keys.T * keys.H * keys.W + keys.conditioning + segments_of(i_bh // heads, samples).text_len
    exponent = tl.maximum(peak.to(tl.int32, bitcast=True) >> EXPONENT, LEAST)
    up = ((-exponent + 2 * BIAS + PEAK) << EXPONENT).to(tl.float32, bitcast=True)
    down = ((exponent - PEAK) << EXPONENT).to(tl.float32, bitcast=True)
    p_scales = scales + i_bh * 3 * BLOCK_D + o_d
    tl.store(p_scales, total / tokens)
    tl.store(p_scales + BLOCK_D, up)
    tl.store(p_scales + 2 * BLOCK_D, down)


@kernel
def quantise_kernel(
    k8, v16, steps, k, v, scales, samples, keys, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One block of keys less their mean in 8 bits, and its values times their factors in fp16: [B H, Nk, BLOCK_D].

    `steps`: fp32 [B H, Nk], the size of the block's steps at the row of its first token. Rows that are no key stay
    unwritten, and are never read.
    """
    i_bh, o_d = tl.program_id(1), tl.arange(0, BLOCK_D)
    segments = segments_of(i_bh // heads, samples)
    b_k, b_v, rows, valid = program_keys(k, v, segments, keys, heads, D, BLOCK_D, ALIGN, BLOCK_K, TILE_K)
    p_scales = scales + i_bh * 3 * BLOCK_D + o_d
    b_k = tl.where(valid[:, None], b_k - tl.load(p_scales)[None, :], 0.0)
    factor, step = steps_of(tl.max(tl.max(tl.abs(b_k), 1), 0))
    first = i_bh.to(tl.int64) * keys.tokens
    p_rows = (first + rows)[:, None] * BLOCK_D + o_d
    tl.store(k8 + p_rows, quantised(b_k, factor), mask=valid[:, None])
    tl.store(v16 + p_rows, (b_v * tl.load(p_scales + BLOCK_D)[None, :]).to(tl.float16), mask=valid[:, None])
    corner = corner_of(tl.program_id(0), segments, keys, BLOCK_K, TILE_K)
    tl.store(steps + first + corner.first + corner.place, step)


@triton.jit
def own_queries(q, mean, scale, rows, valid, i_bh, heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
                ALIGN: tl.constexpr):  # fmt: skip
    """Queries, fp32 [BLOCK_Q, BLOCK_D]; a positive scale in base 2; what the mean key adds to each one's logits."""
    b_q = load_rows(rows_of_head(q, i_bh, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_q, base_2 = with_positive_scale(b_q.to(tl.float32), scale)
    return b_q, base_2, tl.sum(b_q * tl.load(mean + tl.arange(0, BLOCK_D))[None, :], 1) * base_2


@kernel
def block_sparse_8_fwd_kernel(
    out, q, k8, v16, steps, scales, lse, lists, samples, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_TABLES: tl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of one query block of one head; each query has a scale of its own.

    Args:
        q: `Heads`.
        k8, v16, steps, scales: of the kernels above.
        lists, samples: `Lists` and `SampleSegments`.
        keys, queries: a `Side` each.
    """
    i_q, i_bh, segments, starts, rows, valid = program_queries(samples, queries, heads, BLOCK_Q, TILE_Q)
    mean = scales + i_bh * 3 * BLOCK_D
    b_q, base_2, shift = own_queries(q, mean, scale, rows, valid, i_bh, heads, D, BLOCK_D, ALIGN)
    factor, step = steps_of(tl.max(tl.abs(b_q), 1))
    # What is not finite stays so: 8 bits would hide it.
    b_q8, b_scale = quantised(b_q, factor[:, None]), tl.maximum(step * base_2, SMALLEST) + 0.0 * shift

    first = i_bh.to(tl.int64) * keys.tokens
    acc, m, l = over_key_lists(  # noqa: E741
        Query(b_q8, None, None, None),
        KeyRows(k8 + first * BLOCK_D, BLOCK_D, steps + first), HeadRows(v16 + first * BLOCK_D, BLOCK_D), b_scale,
        key_list(i_bh * lists.per_head * queries.blocks + i_q, lists), lists.words, segments, keys,
        BLOCK_D, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, STEP, HAS_TABLES, False,
    )  # fmt: skip
    acc, b_lse = finalize(acc, m - PEAK, l)
    # All of this is computed anew, so that the loops hold none of it.
    i_bh, rows, valid = program_queries_again(starts, queries, BLOCK_Q, TILE_Q)
    mean = scales + i_bh * 3 * BLOCK_D
    acc *= tl.load(mean + 2 * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    store_rows_of_head(out, rows, valid, acc, i_bh, heads, queries.tokens, D, BLOCK_D)
    _q, _scale, shift = own_queries(q, mean, scale, rows, valid, i_bh, heads, D, BLOCK_D, ALIGN)
    tl.store(lse + i_bh.to(tl.int64) * queries.tokens + rows, b_lse + shift / LOG2E, mask=valid)
