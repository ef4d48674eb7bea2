"""Linear attention of every query block over its marginal key blocks.

The state over all keys is subtracted by what the critical and skipped blocks add to it, made anew as
phi(q) phi(k)^T v: no D x D state a block. Where less than half of a row's total is left, the difference would have lost
its digits; such a query block sums its marginal blocks one by one instead. All terms of the denominator are positive,
so that its share tells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import load_rows
from dit_accel.kernels.sla.triton_features import mapped
from dit_accel.kernels.sla.triton_rows import slots_of


@triton.jit
def with_keys(
    acc, side, x, k, v, block, first, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what STEP slots of a key block give to a query block.

    Forward, with x = phi(q): acc + (x b^T) v, and the row sums of x b^T to `side` [BLOCK], where b = phi(k). Backward,
    with x = g: acc + (x v^T) b, and the sum of b over the slots to `side` [BLOCK_D].
    """
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
def routed(kept, dropped, i_bh, i_q, blocks, n_kept, n_dropped):
    """Where both lists of a query block begin, and how many blocks each holds."""
    row = i_bh.to(tl.int64) * blocks + i_q
    return kept + row * n_kept, dropped + row * n_dropped, n_kept, n_dropped


@triton.jit
def over_listed(
    acc, side, x, k, v, lists, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`with_keys` over the blocks of both lists; `lists` are `routed`."""
    kept, dropped, n_kept, n_dropped = lists
    STEPS: tl.constexpr = CUT[0] // STEP
    for i in range((n_kept + n_dropped) * STEPS):
        place = i // STEPS
        block = tl.load(tl.where(place < n_kept, kept + place, dropped + (place - n_kept)))
        acc, side = with_keys(
            acc, side, x, k, v, block, i % STEPS * STEP, grid, D, BLOCK_D, CUT, STEP, MAP, BACKWARD, PRECISION
        )  # fmt: skip
    return acc, side


@triton.jit
def over_others(
    acc, side, x, k, v, lists, grid, blocks,
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
                    acc, side, x, k, v, block, first, grid, D, BLOCK_D, CUT, STEP, MAP, BACKWARD, PRECISION
                )  # fmt: skip
    return acc, side


@triton.jit
def with_queries(
    of_v, of_k, weights, phi_k, b_v, sign, q, grad_out, factors, block, first, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sign times what STEP slots of a query block give to (b a^T / d) g, (v g^T / d) a and -sum of a r / d."""
    denominators, ratios = factors
    rows, valid = slots_of(block, first, grid, CUT, STEP)
    b_q = load_rows(q, rows, valid, D, BLOCK_D)
    b_g = load_rows(grad_out, rows, valid, D, BLOCK_D).to(b_q.dtype)
    denominator = tl.load(denominators + rows, mask=valid, other=1.0)
    ratio = tl.load(ratios + rows, mask=valid, other=0.0)
    # 1 / d is shared between both factors of each product, so that neither leaves the range of half precision
    share = 1.0 / tl.sqrt(denominator)
    scaled = (tl.where(valid[:, None], mapped(b_q, D, MAP), 0.0) * share[:, None]).to(b_q.dtype)
    share = share * sign
    products = tl.dot(phi_k, tl.trans(scaled), input_precision=PRECISION) * share[None, :]
    of_v = tl.dot(products.to(b_g.dtype), b_g, of_v, input_precision=PRECISION)
    products = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) * share[None, :]
    of_k = tl.dot(products.to(scaled.dtype), scaled, of_k, input_precision=PRECISION)
    weights -= tl.sum(scaled.to(tl.float32) * (ratio * share)[:, None], 0)
    return of_v, of_k, weights


@triton.jit
def holds_block(entries, n, block):
    """Whether a list holds a block: 1 or 0."""
    found = 0
    for first in range(0, n, 64):
        place = first + tl.arange(0, 64)
        entry = tl.load(entries + place, mask=place < n, other=-1)
        found = tl.maximum(found, tl.max((entry == block).to(tl.int32), 0))
    return found


@triton.jit
def over_selecting(
    of_v, of_k, weights, phi_k, b_v, i_k, q, grad_out, factors, routes, transposed, alone, grid, blocks, dense,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, STEP: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`with_queries` for a visual key block: less those that keep or drop it, plus those that were summed one by one.

    Args:
        routes: all lists, kept and dropped, and how many blocks each holds.
        transposed: entries and firsts of both, as in `triton_lists.Transposed`; the first with `dense` blocks behind.
        alone: whether a query block was summed one by one; those that were, first in a list; how many they are.
    """
    STEPS: tl.constexpr = CUT[0] // STEP
    kept, dropped, n_kept, n_dropped = routes
    entries, firsts, dropped_entries, dropped_firsts = transposed
    modes, singles, n_singles = alone
    i_bh = tl.program_id(1)
    first_list = i_bh.to(tl.int64) * blocks
    for BY in tl.static_range(2):  # query blocks that keep this key block, and that drop it
        selecting = dropped_entries if BY else entries
        p_first = dropped_firsts if BY else firsts
        p_first += i_bh.to(tl.int64) * (2 * (blocks + (0 if BY else dense)) + 1) + 2 * i_k
        for i in range(tl.load(p_first) * STEPS, tl.load(p_first + 2) * STEPS):
            block = tl.load(selecting + i // STEPS)
            if tl.load(modes + first_list + block) == 0:
                of_v, of_k, weights = with_queries(
                    of_v, of_k, weights, phi_k, b_v, -1.0, q, grad_out, factors, block, i % STEPS * STEP, grid,
                    D, BLOCK_D, CUT, STEP, MAP, PRECISION,
                )  # fmt: skip
    for i in range(tl.load(n_singles + i_bh)):
        block = tl.load(singles + first_list + i)
        kept_b, dropped_b, _, _ = routed(kept, dropped, i_bh, block, blocks, n_kept, n_dropped)
        if holds_block(kept_b, n_kept, i_k) + holds_block(dropped_b, n_dropped, i_k) == 0:
            for first in range(0, CUT[0], STEP):
                of_v, of_k, weights = with_queries(
                    of_v, of_k, weights, phi_k, b_v, 1.0, q, grad_out, factors, block, first, grid,
                    D, BLOCK_D, CUT, STEP, MAP, PRECISION,
                )  # fmt: skip
    return of_v, of_k, weights
