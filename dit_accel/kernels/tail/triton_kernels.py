"""The tail's kernels: pseudo-keys, the map of blocks outside the tail, and both directions over the pseudo-keys.

Pseudo-keys and their values lie in memory as [B, H, blocks, D]. The map is uint8 [B, H, query blocks, blocks], 1 where
a block is not in the tail. A program's second number is its head, counted over all samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_backward import row_lse, row_statistics
from dit_accel.kernels.block_sparse.triton_forward import LOG2E, absorb, normalised
from dit_accel.kernels.block_sparse.triton_tokens import RUNTIME, load_rows, rows_of, store_rows
from dit_accel.kernels.sla.triton_linear import slots_of


@triton.jit(do_not_specialize=RUNTIME)
def pseudo_keys_kernel(
    k, v, keys, values,
    k_batch, k_head, k_row, v_batch, v_head, v_row, T, H, W, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
):  # fmt: skip
    """Store the mean key and the mean value of one block's tokens."""
    CUT: tl.constexpr = (BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
    rows, valid = slots_of(tl.program_id(0), 0, (T, H, W), CUT, BLOCK_K)
    held = tl.sum(valid.to(tl.float32), 0)
    o_d = tl.arange(0, BLOCK_D)
    place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D + o_d
    b_k = load_rows(rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    tl.store(keys + place, (tl.sum(b_k.to(tl.float32), 0) / held).to(keys.dtype.element_ty), mask=o_d < D)
    b_v = load_rows(rows_of(v, (v_batch, v_head, v_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    tl.store(values + place, (tl.sum(b_v.to(tl.float32), 0) / held).to(values.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=RUNTIME)
def outside_kernel(outside, indices, counts, width, blocks, STEP: tl.constexpr):
    """Mark the listed blocks of one query block in its row of the map."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    for first in range(0, count, STEP):
        place = first + tl.arange(0, STEP)
        block = tl.load(indices + row * width + place, mask=place < count, other=0)
        tl.store(outside + row * blocks + block, tl.full([STEP], 1, tl.uint8), mask=place < count)


@triton.jit
def pseudo_rows(x, blocks, D: tl.constexpr):
    """Where this program's head of pseudo-keys or values begins."""
    return x + tl.program_id(1).to(tl.int64) * blocks * D


@triton.jit
def biases(outside, logs, columns, blocks):
    """Logarithms of the tokens of some blocks; -inf where a block is not in the tail."""
    skipped = tl.load(outside + columns, mask=columns < blocks, other=1)
    return tl.where(skipped == 0, tl.load(logs + columns, mask=columns < blocks, other=0.0), float("-inf"))


@triton.jit(do_not_specialize=RUNTIME)
def tail_fwd_kernel(
    q, exact, exact_lse, keys, values, logs, outside, out, lse,
    q_batch, q_head, q_row, e_batch, e_head, e_row, scale, T, H, W, heads, tokens, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] and LSE [B, H, N] of one query block; the online softmax starts from the exact part.

    Pseudo-keys are taken in steps of STEP <= BLOCK_K.
    """
    CUT: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    i_bh = tl.program_id(1).to(tl.int64)
    rows, valid = slots_of(tl.program_id(0), 0, (T, H, W), CUT, BLOCK_Q)
    outside += (i_bh * tl.num_programs(0) + tl.program_id(0)) * blocks
    o_d = tl.arange(0, BLOCK_D)
    p_k = pseudo_rows(keys, blocks, D) + o_d[:, None]
    p_v = pseudo_rows(values, blocks, D) + o_d[None, :]
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_e = load_rows(rows_of(exact, (e_batch, e_head, e_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    peak = tl.load(exact_lse + i_bh * tokens + rows, mask=valid, other=0.0) * LOG2E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    acc = b_e.to(tl.float32)
    for first in range(0, blocks, STEP):
        columns = first + tl.arange(0, STEP)
        inside = columns < blocks
        b_k = tl.load(p_k + columns[None, :] * D, mask=inside[None, :] & (o_d < D)[:, None], other=0.0)
        b_v = tl.load(p_v + columns[:, None] * D, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
        scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + biases(outside, logs, columns, blocks)[None, :]
        acc, peak, total = absorb(acc, peak, total, scores, LOG2E, b_v, PRECISION)
    acc, b_lse = normalised(acc, peak, total)
    store_rows(out, rows, valid, acc, heads, tokens, D, BLOCK_D)
    tl.store(lse + i_bh * tokens + rows, b_lse, mask=valid)


@triton.jit(do_not_specialize=RUNTIME)
def tail_bwd_kernel_dq(
    q, grad_out, out, exact, grad_lse, lse, exact_lse, keys, values, logs, outside, dq, dexact, dexact_lse, delta,
    q_batch, q_head, q_row, g_batch, g_head, g_row, o_batch, o_head, o_row, e_batch, e_head, e_row,
    scale, T, H, W, heads, tokens, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and d(exact) [B, N, H, D], d(exact_lse) and delta [B, H, N] of one query block."""
    CUT: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    i_bh = tl.program_id(1).to(tl.int64)
    rows, valid = slots_of(tl.program_id(0), 0, (T, H, W), CUT, BLOCK_Q)
    place = i_bh * tokens + rows
    b_lse = row_lse(lse, place, valid)
    b_g = load_rows(rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_o = load_rows(rows_of(out, (o_batch, o_head, o_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + place, mask=valid, other=0.0)
    share = tl.exp2((tl.load(exact_lse + place, mask=valid, other=float("-inf")) - b_lse) * LOG2E)
    b_e = load_rows(rows_of(exact, (e_batch, e_head, e_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    of_lse = share * (tl.sum(b_g.to(tl.float32) * b_e.to(tl.float32), 1) - b_delta)
    tl.store(delta + place, b_delta, mask=valid)
    tl.store(dexact_lse + place, of_lse, mask=valid)
    store_rows(dexact, rows, valid, b_g.to(tl.float32) * share[:, None], heads, tokens, D, BLOCK_D)

    outside += (i_bh * tl.num_programs(0) + tl.program_id(0)) * blocks
    o_d = tl.arange(0, BLOCK_D)
    p_k = pseudo_rows(keys, blocks, D) + o_d[None, :]
    p_v = pseudo_rows(values, blocks, D) + o_d[:, None]
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    for first in range(0, blocks, STEP):
        columns = first + tl.arange(0, STEP)
        inside = columns < blocks
        b_k = tl.load(p_k + columns[:, None] * D, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
        b_v = tl.load(p_v + columns[None, :] * D, mask=inside[None, :] & (o_d < D)[:, None], other=0.0)
        exponent = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        exponent += biases(outside, logs, columns, blocks)[None, :] - b_lse[:, None]
        ds = tl.exp2(exponent * LOG2E) * (tl.dot(b_g, b_v, input_precision=PRECISION) - b_delta[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
    store_rows(dq, rows, valid, acc * scale, heads, tokens, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def tail_bwd_kernel_dkdv(
    q, grad_out, lse, delta, keys, values, logs, outside, of_keys, of_values,
    q_batch, q_head, q_row, g_batch, g_head, g_row, scale, T, H, W, heads, tokens, query_blocks, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_K pseudo-keys and of their values, fp32 [B, H, blocks, D]; queries in steps of STEP rows."""
    CUT: tl.constexpr = (BLOCK_Q, TILE_QT, TILE_QH, TILE_QW)
    STEPS: tl.constexpr = BLOCK_Q // STEP
    i_bh = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    place = columns[:, None] * D + o_d[None, :]
    there = (columns < blocks)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(pseudo_rows(keys, blocks, D) + place, mask=there, other=0.0)
    b_v = tl.load(pseudo_rows(values, blocks, D) + place, mask=there, other=0.0)
    p_q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    p_g = rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN)
    acc_k = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for i in range(query_blocks * STEPS):
        rows, valid = slots_of(i // STEPS, i % STEPS * STEP, (T, H, W), CUT, STEP)
        b_q = load_rows(p_q, rows, valid, D, BLOCK_D)
        b_g = load_rows(p_g, rows, valid, D, BLOCK_D)
        b_lse, b_delta = row_statistics(lse, delta, i_bh * tokens + rows, valid)
        bias = biases(outside + (i_bh * query_blocks + i // STEPS) * blocks, logs, columns, blocks)
        exponent = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + bias[:, None] - b_lse[None, :]
        weights = tl.exp2(exponent * LOG2E)
        acc_v = tl.dot(weights.to(b_g.dtype), b_g, acc_v, input_precision=PRECISION)
        ds = weights * (tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) - b_delta[None, :])
        acc_k = tl.dot(ds.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)
    tl.store(pseudo_rows(of_keys, blocks, D) + place, acc_k * scale, mask=there)
    tl.store(pseudo_rows(of_values, blocks, D) + place, acc_v, mask=there)
