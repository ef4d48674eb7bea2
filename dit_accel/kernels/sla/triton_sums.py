"""Sums over the tokens for the linear branch, a D x D table a head each. Made in splits, in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import load_rows, rows_of
from dit_accel.kernels.sla.triton_features import mapped
from dit_accel.kernels.sla.triton_router import store_mean
from dit_accel.kernels.sla.triton_rows import slots_of, store_sums


@triton.jit(do_not_specialize=[
    "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "T", "H", "W", "heads", "blocks",
])  # fmt: skip
def state_kernel(
    k, v, states, totals, means,
    k_batch, k_head, k_row, v_batch, v_head, v_row, T, H, W, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(k)^T v fp32 [B, H, splits, D, D] and the sum of phi(k) fp32 [B, H, splits, D] over SPLIT blocks.

    k is read for the router too: the mean of each block, as `block_means_kernel` writes it.
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    STEPS: tl.constexpr = BLOCK // STEP
    k = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    v = rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    state = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    of_block = tl.zeros([BLOCK_D], dtype=tl.float32)
    held = 0.0
    first = tl.program_id(0) * SPLIT
    for i in range(first * STEPS, tl.minimum(first + SPLIT, blocks) * STEPS):
        rows, valid = slots_of(i // STEPS, i % STEPS * STEP, (T, H, W), CUT, STEP)
        b_k = load_rows(k, rows, valid, D, BLOCK_D)
        b_v = load_rows(v, rows, valid, D, BLOCK_D)
        of_block = tl.sum(b_k.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, of_block)
        held = tl.sum(valid.to(tl.float32), 0) + tl.where(i % STEPS == 0, 0.0, held)
        phi = tl.where(valid[:, None], mapped(b_k, D, MAP), 0.0).to(b_v.dtype)
        state = tl.dot(tl.trans(phi), b_v, state, input_precision=PRECISION)
        total += tl.sum(phi.to(tl.float32), 0)
        # the mean of the steps so far; the last one's stays
        store_mean(means, i // STEPS, of_block, held, blocks, D, BLOCK_D)
    store_sums(states, totals, state, total, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "g_batch", "g_head", "g_row", "heads", "tokens",
])  # fmt: skip
def sums_kernel(
    q, grad_out, inverses, ratios, dstates, dtotals, dbias,
    q_batch, q_head, q_row, g_batch, g_head, g_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over SPLIT tokens, in fp32: dP = sum of a^T g / d [.., D, D], dz = -sum of a r / d and the sum of g [.., D]."""
    q = rows_of(q, (q_batch, q_head, q_row), heads, ALIGN)
    grad_out = rows_of(grad_out, (g_batch, g_head, g_row), heads, ALIGN)
    first_place = tl.program_id(1).to(tl.int64) * tokens
    dstate = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    dtotal = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = tl.program_id(0) * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, tokens), STEP):
        rows = start + tl.arange(0, STEP)
        valid = rows < tokens
        b_q = load_rows(q, rows, valid, D, BLOCK_D)
        b_g = load_rows(grad_out, rows, valid, D, BLOCK_D).to(tl.float32)
        inverse = tl.load(inverses + first_place + rows, mask=valid, other=0.0)
        ratio = tl.load(ratios + first_place + rows, mask=valid, other=0.0)
        phi = mapped(b_q, D, MAP).to(b_q.dtype)
        dtotal -= tl.sum(phi.to(tl.float32) * (ratio * inverse)[:, None], 0)
        b_dbias += tl.sum(b_g, 0)
        shares = b_g * inverse[:, None]
        if b_q.dtype == tl.float16:
            # g / d may be beyond the range of half precision: bring the tile's largest to 1
            largest = tl.max(tl.max(tl.abs(shares), 1), 0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            shares = (shares * (1.0 / largest)).to(b_q.dtype)
            dstate += tl.dot(tl.trans(phi), shares, input_precision=PRECISION) * largest
        else:
            dstate = tl.dot(tl.trans(phi), shares.to(b_q.dtype), dstate, input_precision=PRECISION)
    store_sums(dstates, dtotals, dstate, dtotal, D, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dbias + place * D + o_d, b_dbias, mask=o_d < D)
