"""Linear attention of every query block over its marginal key blocks, forward.

The state over all keys is subtracted by what the critical and skipped blocks add to it, made anew as
phi(q) phi(k)^T v: no D x D state a block. Where less than half of a row's total is left, the difference would have lost
its digits; such a query block sums its marginal blocks one by one instead. All terms of the denominator are positive,
so that its share tells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.triton_features import EPS, mapped
from dit_accel.kernels.sla.triton_rows import load_rows, load_table, load_total, rows_of, slots_of, store_rows


@triton.jit
def with_keys(
    acc, side, x, keys, block, first, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what STEP slots of a key block give to a query block.

    Forward, with x = phi(q): acc + (x b^T) v, and the row sums of x b^T to `side` [BLOCK], where b = phi(k). Backward,
    with x = g: acc + (x v^T) b, and the sum of b over the slots to `side` [BLOCK_D].
    """
    k, v = keys
    rows, valid = slots_of(block, first, grid, CUT, STEP)
    b_v = load_rows(v, rows, valid, D, BLOCK_D)
    phi_k = tl.where(valid[:, None], mapped(load_rows(k, rows, valid, D, BLOCK_D), D, MAP), 0.0).to(b_v.dtype)
    if BACKWARD:
        products = tl.dot(x, tl.trans(b_v), input_precision=PRECISION).to(b_v.dtype)
        acc = tl.dot(products, phi_k, acc, input_precision=PRECISION)
        side += tl.sum(phi_k.to(tl.float32), 0)
    else:
        products = tl.dot(x, tl.trans(phi_k), input_precision=PRECISION).to(b_v.dtype)
        acc = tl.dot(products, b_v, acc, input_precision=PRECISION)
        side += tl.sum(products.to(tl.float32), 1)
    return acc, side


@triton.jit
def lists_of(kept, dropped, blocks, n_kept, n_dropped):
    """This program's query block among those of all heads; its lists, and how many blocks each holds."""
    row = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
    return row, (kept + row * n_kept, dropped + row * n_dropped, n_kept, n_dropped)


@triton.jit
def over_listed(
    acc, side, x, keys, lists, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`with_keys` over the blocks of both lists; `lists` as `lists_of` gives them."""
    kept, dropped, n_kept, n_dropped = lists
    STEPS: tl.constexpr = CUT[0] // STEP
    for i in range((n_kept + n_dropped) * STEPS):
        place = i // STEPS
        block = tl.load(tl.where(place < n_kept, kept + place, dropped + (place - n_kept)))
        acc, side = with_keys(
            acc, side, x, keys, block, i % STEPS * STEP, grid, D, BLOCK_D, CUT, STEP, MAP, BACKWARD, PRECISION
        )  # fmt: skip
    return acc, side


@triton.jit
def over_others(
    acc, side, x, keys, lists, grid, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`with_keys` over the blocks of neither list. Both ascend: they are walked along with the blocks."""
    kept, dropped, n_kept, n_dropped = lists
    i_kept = 0
    i_dropped = 0
    for block in range(blocks):
        next_kept = tl.load(kept + i_kept, mask=i_kept < n_kept, other=-1)
        next_dropped = tl.load(dropped + i_dropped, mask=i_dropped < n_dropped, other=-1)
        if next_kept == block:
            i_kept += 1
        elif next_dropped == block:
            i_dropped += 1
        else:
            for first in range(0, CUT[0], STEP):
                acc, side = with_keys(
                    acc, side, x, keys, block, first, grid, D, BLOCK_D, CUT, STEP, MAP, BACKWARD, PRECISION
                )  # fmt: skip
    return acc, side


@triton.jit(do_not_specialize=[
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "T", "H", "W", "heads", "tokens", "blocks", "n_kept", "n_dropped",
])  # fmt: skip
def marginal_kernel(
    q, k, v, table, peaks, totals, kept, dropped, out, denominators, modes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    T, H, W, heads, tokens, blocks, n_kept, n_dropped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    STEP: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] and denominators with eps fp32 [B, H, N] of one query block of one head.

    modes: int32 [B, H, blocks], 1 where the marginal blocks were summed one by one.
    """
    CUT: tl.constexpr = (BLOCK, TILE_T, TILE_H, TILE_W)
    i_bh = tl.program_id(1)
    grid = (T, H, W)
    keys = rows_of(k, (k_batch, k_head, k_row), heads, ALIGN), rows_of(v, (v_batch, v_head, v_row), heads, ALIGN)
    list_row, lists = lists_of(kept, dropped, blocks, n_kept, n_dropped)

    rows, valid = slots_of(tl.program_id(0), 0, grid, CUT, BLOCK)
    b_q = load_rows(rows_of(q, (q_batch, q_head, q_row), heads, ALIGN), rows, valid, D, BLOCK_D)
    phi = mapped(b_q, D, MAP)
    # rows of phi are brought to the sum 1, so that products stay in the range of half precision
    size = tl.sum(phi, 1)
    size = tl.where(size > 0.0, size, 1.0)
    phi_q = (phi / size[:, None]).to(b_q.dtype)
    whole = tl.sum(phi_q.to(tl.float32) * load_total(totals, D, BLOCK_D)[None, :], 1)

    one_by_one = 2 * (n_kept + n_dropped) > blocks
    acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    seen = tl.zeros([BLOCK], dtype=tl.float32)
    if not one_by_one:
        acc, seen = over_listed(acc, seen, phi_q, keys, lists, grid, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION)
        lost = valid & (2.0 * seen > whole)
        one_by_one = tl.max(lost.to(tl.int32), 0) > 0
    if one_by_one:
        acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        seen = tl.zeros([BLOCK], dtype=tl.float32)
        acc, seen = over_others(
            acc, seen, phi_q, keys, lists, grid, blocks, D, BLOCK_D, CUT, STEP, MAP, False, PRECISION
        )  # fmt: skip
    else:
        b_t = load_table(table, D, BLOCK_D)
        acc = tl.dot(phi_q, b_t, input_precision=PRECISION) * tl.load(peaks + i_bh) - acc
        seen = tl.maximum(whole - seen, 0.0)
    denominator = seen + EPS / size
    store_rows(out, rows, valid, acc * (1.0 / denominator)[:, None], heads, tokens, D, BLOCK_D)
    tl.store(denominators + i_bh.to(tl.int64) * tokens + rows, denominator * size, mask=valid)
    tl.store(modes + list_row, tl.where(one_by_one, 1, 0))
