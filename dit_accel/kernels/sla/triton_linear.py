"""Linear attention over all keys, forward: a state per head, summed in splits, and its application to the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_features import EPS, mapped
from dit_accel.kernels.sla.triton_router import store_mean
from dit_accel.kernels.sla.triton_rows import (
    load_rows,
    load_table,
    load_total,
    rows_of,
    slots_of,
    store_rows,
    store_sums,
)


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
    k = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN)
    v = rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    state = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = tl.program_id(0) * SPLIT
    for block in range(first, tl.minimum(first + SPLIT, blocks)):
        of_block = tl.zeros([BLOCK_D], dtype=tl.float32)
        held = 0.0
        for slot in tl.static_range(0, BLOCK, STEP):
            rows, valid = slots_of(block, slot, (T, H, W), CUT, STEP)
            b_k = load_rows(k, rows, valid, D, BLOCK_D)
            b_v = load_rows(v, rows, valid, D, BLOCK_D)
            of_block += tl.sum(b_k.to(tl.float32), 0)
            held += tl.sum(valid.to(tl.float32), 0)
            phi = tl.where(valid[:, None], mapped(b_k, D, MAP), 0.0).to(b_v.dtype)
            state = tl.dot(tl.trans(phi), b_v, state, input_precision=PRECISION)
            total += tl.sum(phi.to(tl.float32), 0)
        store_mean(means, block, of_block, held, blocks, D, BLOCK_D)
    store_sums(states, totals, state, total, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "e_batch", "e_head", "e_row", "heads", "tokens",
])  # fmt: skip
def apply_kernel(
    q, exact, table, peaks, totals, bias, out,
    q_batch, q_head, q_row, e_batch, e_head, e_row, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exact + phi(q) state / (phi(q) . total + eps) + bias, [B, N, H, D]; the state is table * peak, [D, D] a head."""
    rows = tl.program_id(0) * STEP + tl.arange(0, STEP)
    valid = rows < tokens
    b_t = load_table(table, D, BLOCK_D)
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    phi = mapped(b_q, D, MAP).to(b_t.dtype)
    denominator = tl.sum(phi.to(tl.float32) * load_total(totals, D, BLOCK_D)[None, :], 1) + EPS
    factor = tl.load(peaks + tl.program_id(1)) / denominator
    result = tl.dot(phi, b_t, input_precision=PRECISION) * factor[:, None]
    if HAS_BIAS:
        o_d = tl.arange(0, BLOCK_D)
        result += tl.load(bias + o_d, mask=o_d < D, other=0.0)[None, :]
    exact = rows_of(exact, (e_batch, e_head, e_row), heads, 1)
    result += load_rows(exact, rows, valid, D, BLOCK_D).to(tl.float32)
    store_rows(out, rows, valid, result, heads, tokens, D, BLOCK_D)
