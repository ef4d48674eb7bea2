"""The tail's kernels: pseudo-keys, the map of blocks outside the tail, attention with the tail, and its gradients.

Pseudo-keys and their values lie in memory as [B, H, blocks, D]. The map is uint8 [B, H, query blocks, blocks], 1 where
a block is not in the tail. The backward kernels have the tail's part alone: with one softmax, the engine's have the
listed keys' part. A program's second number is its head, counted over all samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_backward import row_lse, row_statistics
from dit_accel.kernels.block_sparse.triton_forward import (
    attend_lists,
    online_softmax_step,
    store_output,
)
from dit_accel.kernels.block_sparse.triton_tokens import (
    LOG2E,
    load_rows,
    rows_of,
    store_rows,
    visual_slots,
)
from dit_accel.kernels.jit import kernel


@kernel
def pseudo_keys_kernel(
    pseudo_k, pseudo_v, k, v, keys, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Store the mean key and the mean value of one block's tokens."""
    rows, valid, _raster = visual_slots(tl.program_id(0), tl.arange(0, BLOCK_K), keys, BLOCK_K, TILE_K)
    held = tl.sum(valid.to(tl.float32), 0)
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D + o_d
    b_k = load_rows(rows_of(k, heads, ALIGN), rows, valid, D, BLOCK_D)
    tl.store(pseudo_k + place, (tl.sum(b_k.to(tl.float32), 0) / held).to(pseudo_k.dtype.element_ty), mask=o_d < D)
    b_v = load_rows(rows_of(v, heads, ALIGN), rows, valid, D, BLOCK_D)
    tl.store(pseudo_v + place, (tl.sum(b_v.to(tl.float32), 0) / held).to(pseudo_v.dtype.element_ty), mask=o_d < D)


@kernel
def outside_kernel(outside, indices, counts, width, blocks, STEP: tl.constexpr):
    """Mark the listed visual blocks of one query block in its row of the map; the list may hold blocks behind them."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    for first in range(0, count, STEP):
        place = first + tl.arange(0, STEP)
        block = tl.load(indices + row * width + place, mask=place < count, other=blocks)
        tl.store(outside + row * blocks + block, tl.full([STEP], 1, tl.uint8), mask=block < blocks)


@triton.jit
def pseudo_rows(x, i_bh, blocks, D: tl.constexpr):
    """Where a head of pseudo-keys or values begins."""
    return x + i_bh.to(tl.int64) * blocks * D


@triton.jit
def biases(outside, pseudo, columns):
    """Logarithms of the tokens of some blocks; -inf where a block is not in the tail."""
    skipped = tl.load(outside + columns, mask=columns < pseudo.blocks, other=1)
    return tl.where(
        skipped == 0, tl.load(pseudo.logs + columns, mask=columns < pseudo.blocks, other=0.0), float("-inf")
    )


@triton.jit
def over_pseudo_keys(
    acc, m, l, b_q, pseudo, outside, i_bh, base_2, D: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr  # noqa: E741
):  # fmt: skip
    """The online softmax of a query block, continued over the tail: acc, m and l, and the listed keys' part of l.

    Args:
        outside: this query block's row of the map.
        base_2: the scale, above 0 and in base 2. A bias is divided by it, since both are scaled after the product.
    """
    o_d = tl.arange(0, BLOCK_D)
    p_k = pseudo_rows(pseudo.k, i_bh, pseudo.blocks, D) + o_d[:, None]
    p_v = pseudo_rows(pseudo.v, i_bh, pseudo.blocks, D) + o_d[None, :]
    per_log = LOG2E / base_2
    listed = l
    for first in range(0, pseudo.blocks, STEP):
        columns = first + tl.arange(0, STEP)
        inside = columns < pseudo.blocks
        b_k = tl.load(p_k + columns[None, :] * D, mask=inside[None, :] & (o_d < D)[:, None], other=0.0)
        b_v = tl.load(p_v + columns[:, None] * D, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
        scores = tl.dot(b_q, b_k, input_precision="ieee") + (biases(outside, pseudo, columns) * per_log)[None, :]
        before = m
        acc, m, l = online_softmax_step(acc, m, l, scores, base_2, b_v)  # noqa: E741
        listed *= tl.exp2(before - tl.where(m == float("-inf"), 0.0, m))
    return acc, m, l, listed


@kernel
def tail_fwd_kernel(
    out, q, k, v, lse, share, lists, samples, pseudo, keys, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    STEP: tl.constexpr, HAS_SHARE: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] and LSE [B, H, N] of one block of visual queries, over its list and the tail.

    Arguments as in `block_sparse_fwd_kernel`, and:

    Args:
        share: fp32 [B, H, N], written with HAS_SHARE: the share of the tail in a row's weights.
        pseudo: `records.PseudoKeys`.
    """
    acc, m, l, b_q, base_2, i_q, i_bh, starts = attend_lists(  # noqa: E741
        q, k, v, lists, samples, keys, queries, scale, heads,
        D, BLOCK_D, ALIGN, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, STEP, False,
    )  # fmt: skip
    outside = pseudo.outside + (i_bh.to(tl.int64) * queries.blocks + i_q) * pseudo.blocks
    acc, m, l, listed = over_pseudo_keys(acc, m, l, b_q, pseudo, outside, i_bh, base_2, D, BLOCK_D, STEP)  # noqa: E741
    b_lse, first, rows, valid = store_output(out, acc, m, l, starts, queries, heads, D, BLOCK_D, BLOCK_Q, TILE_Q)
    place = first + rows
    tl.store(lse + place, b_lse, mask=valid)
    if HAS_SHARE:
        tl.store(share + place, 1.0 - tl.where(l == 0.0, 1.0, listed / tl.where(l == 0.0, 1.0, l)), mask=valid)


@kernel
def tail_bwd_kernel_dq(
    dq, q, grad_out, out, grad_lse, lse, pseudo, delta, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The tail's part of dq [B, N, H, D] and delta [B, H, N] of one query block."""
    i_bh = tl.program_id(1).to(tl.int64)
    rows, valid, _raster = visual_slots(tl.program_id(0), tl.arange(0, BLOCK_Q), queries, BLOCK_Q, TILE_Q)
    place = i_bh * queries.tokens + rows
    b_lse = row_lse(lse, place, valid)
    b_g = load_rows(rows_of(grad_out, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_o = load_rows(rows_of(out, heads, ALIGN), rows, valid, D, BLOCK_D)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + place, mask=valid, other=0.0)
    tl.store(delta + place, b_delta, mask=valid)

    outside = pseudo.outside + (i_bh * tl.num_programs(0) + tl.program_id(0)) * pseudo.blocks
    o_d = tl.arange(0, BLOCK_D)
    p_k = pseudo_rows(pseudo.k, i_bh, pseudo.blocks, D) + o_d[None, :]
    p_v = pseudo_rows(pseudo.v, i_bh, pseudo.blocks, D) + o_d[:, None]
    b_q = load_rows(rows_of(q, heads, ALIGN), rows, valid, D, BLOCK_D)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    for first in range(0, pseudo.blocks, STEP):
        columns = first + tl.arange(0, STEP)
        inside = columns < pseudo.blocks
        b_k = tl.load(p_k + columns[:, None] * D, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
        b_v = tl.load(p_v + columns[None, :] * D, mask=inside[None, :] & (o_d < D)[:, None], other=0.0)
        exponent = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        exponent += biases(outside, pseudo, columns)[None, :] - b_lse[:, None]
        ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision="ieee") - b_delta[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision="ieee")
    store_rows(dq, rows, valid, acc * scale, heads, queries.tokens, D, BLOCK_D)


@kernel
def tail_bwd_kernel_dkdv(
    dk, dv, q, grad_out, lse, delta, pseudo, queries, scale, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_K pseudo-keys and of their values, fp32 [B, H, blocks, D]; queries in steps of STEP rows."""
    STEPS: tl.constexpr = BLOCK_Q // STEP
    i_bh = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    place = columns[:, None] * D + o_d[None, :]
    there = (columns < pseudo.blocks)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(pseudo_rows(pseudo.k, i_bh, pseudo.blocks, D) + place, mask=there, other=0.0)
    b_v = tl.load(pseudo_rows(pseudo.v, i_bh, pseudo.blocks, D) + place, mask=there, other=0.0)
    p_q = rows_of(q, heads, ALIGN)
    p_g = rows_of(grad_out, heads, ALIGN)
    acc_k = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for i in range(queries.blocks * STEPS):
        slots = i % STEPS * STEP + tl.arange(0, STEP)
        rows, valid, _raster = visual_slots(i // STEPS, slots, queries, BLOCK_Q, TILE_Q)
        b_q = load_rows(p_q, rows, valid, D, BLOCK_D)
        b_g = load_rows(p_g, rows, valid, D, BLOCK_D)
        b_lse, b_delta = row_statistics(lse, delta, i_bh * queries.tokens + rows, valid)
        outside = pseudo.outside + (i_bh * queries.blocks + i // STEPS) * pseudo.blocks
        bias = biases(outside, pseudo, columns)
        exponent = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale + bias[:, None] - b_lse[None, :]
        weights = tl.exp2(exponent * LOG2E)
        acc_v = tl.dot(weights.to(b_g.dtype), b_g, acc_v, input_precision="ieee")
        ds = weights * (tl.dot(b_v, tl.trans(b_g), input_precision="ieee") - b_delta[None, :])
        acc_k = tl.dot(ds.to(b_q.dtype), b_q, acc_k, input_precision="ieee")
    tl.store(pseudo_rows(dk, i_bh, pseudo.blocks, D) + place, acc_k * scale, mask=there)
    tl.store(pseudo_rows(dv, i_bh, pseudo.blocks, D) + place, acc_v, mask=there)
