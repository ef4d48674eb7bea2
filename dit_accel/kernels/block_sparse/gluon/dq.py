"""The dq kernel of the Gluon implementation, for compute capability 9.0; see `forward` for its structure.

A program is one query block of 128 rows of one head, and each consumer has 64 of them. Half a step, 64 keys, has
three products: the scores, the weights' gradients, and dq. The third is multiplied with the next half step's first.

It also writes what the kernel of dk and dv reads of every query: the LSE in base 2, +inf for padding slots and rows
without keys, whose weights then are 0; and delta. Both lie in the order of slots, so that no query needs a mask there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse.gluon.copies import (
    KEYS,
    ROWS,
    end_of,
    fetch,
    head_read,
    head_written,
    list_of,
    over_samples,
    part_of,
    program_item,
    put,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import masked, rows_of_part, words_of
from dit_accel.kernels.block_sparse.gluon.items import allocated
from dit_accel.kernels.block_sparse.gluon.producer import produce_keys
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E
from dit_accel.kernels.jit import gluon_kernel


@gluon.jit
def produce(
    q, g, o, k, v, problem, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: queries, gradients and outputs of both consumers, then keys and values."""
    item = program_item(problem)
    where_q = query_of(item, problem, TILE_Q)
    for part in gl.static_range(2):
        where = part_of(where_q, part, TILE_Q)
        full = buffers.q_full.index(part)
        mbarrier.expect(full, 3 * ROWS * D * 2)
        fetch(q, where, full, buffers.q.index(part), 0, 1, ROWS, HALF, D)
        fetch(g, where, full, buffers.q.index(2 + part), 0, 1, ROWS, HALF, D)
        fetch(o, where, full, buffers.q.index(4 + part), 0, 1, ROWS, HALF, D)
    produce_keys(k, v, list_of(item, 0, problem, BLOCK_K), problem, buffers, D, BLOCK_K, TILE_K, STAGES)


@gluon.jit
def half_step(
    i, operand, acc, fixed, START: gl.constexpr, HALF: gl.constexpr, PART: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, S: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The sum with the half step before, unless this is the START; and ds [ROWS, ROWS] of 64 further keys.

    The scale and the LSE in `fixed` are in base 2.
    """
    q, g, row_lse, delta, scale, walk, problem, buffers = fixed
    stage = i % STAGES
    before = (i - 1 + HALF) % STAGES
    zero = gl.zeros([ROWS, ROWS], gl.float32, S)
    k, v = buffers.k.index(stage).slice(HALF * ROWS, ROWS, 0), buffers.v.index(stage).slice(HALF * ROWS, ROWS, 0)
    if not START:
        summed = warpgroup_mma(operand, buffers.k.index(before).slice(ROWS - HALF * ROWS, ROWS, 0), acc, is_async=True)
    scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if not START:
        acc = warpgroup_mma_wait(1, deps=(summed,))
    if HALF == 0:
        if not START:
            mbarrier.arrive(buffers.k_empty.index(before), count=1)
        mbarrier.wait(buffers.v_full.index(stage), i // STAGES & 1)
    dp = warpgroup_mma(g, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    exponents = scores * scale - row_lse[:, None]
    if i * (KEYS // BLOCK_K) + HALF // (BLOCK_K // 64) >= walk.listed.pure:
        words = words_of(i, walk, problem, buffers, PART, HALF, BLOCK_K, STAGES, S)
        exponents = masked(exponents, words, words, S)
    weights = gl.exp2(exponents)
    # The branch in this wait keeps the assembler from moving the weights behind the wait for their gradients
    needed = i + HALF
    mbarrier.wait(buffers.k_full.index(needed % STAGES), needed // STAGES & 1, pred=needed < end_of(walk, BLOCK_K))
    dp, weights = warpgroup_mma_wait(0, deps=(dp, weights))
    if HALF == 1:
        mbarrier.arrive(buffers.v_empty.index(stage), count=1)
    return gl.convert_layout((weights * (dp - delta[:, None])).to(q.dtype), P), acc


@gluon.jit
def consume(
    dq, lse, grad_lse, statistics, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: LSE and delta of 64 query rows, then dq over the whole list."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    q, g, o = buffers.q.index(PART), buffers.q.index(2 + PART), buffers.q.index(4 + PART)
    rows, valid = rows_of_part(
        part_of(query_of(program_item(problem), problem, TILE_Q), PART, TILE_Q), problem.queries, HALF, S
    )
    row_lse = gl.load(lse + rows, mask=valid, other=float("inf")) * LOG2E
    row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse)
    delta = gl.load(grad_lse + rows, mask=valid & ((problem.present & 4) != 0), other=0.0)
    mbarrier.wait(buffers.q_full.index(PART), 0)
    products = gl.sum(o.load(A).to(gl.float32) * g.load(A).to(gl.float32), 1)
    delta = gl.convert_layout(products, gl.SliceLayout(1, S)) - delta
    unit = program_item(problem).block * 2 + PART
    slots = unit * (2 * ROWS) + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    gl.store(statistics + slots, row_lse)
    gl.store(statistics + ROWS + slots, delta)

    walk = list_of(program_item(problem), 0, problem, BLOCK_K)
    steps = end_of(walk, BLOCK_K)
    fixed = q, g, row_lse, delta, scale * LOG2E, walk, problem, buffers
    acc = gl.zeros([ROWS, D], gl.float32, A)
    if steps > 0:
        mbarrier.wait(buffers.k_full.index(0), 0)
        operand, acc = half_step(0, acc, acc, fixed, True, 0, PART, BLOCK_K, STAGES, S, P)
        for i in range(1, steps):
            operand, acc = half_step(i - 1, operand, acc, fixed, False, 1, PART, BLOCK_K, STAGES, S, P)
            operand, acc = half_step(i, operand, acc, fixed, False, 0, PART, BLOCK_K, STAGES, S, P)
        operand, acc = half_step(steps - 1, operand, acc, fixed, False, 1, PART, BLOCK_K, STAGES, S, P)
        last = buffers.k.index((steps - 1) % STAGES).slice(ROWS, ROWS, 0)
        summed = warpgroup_mma(operand, last, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(summed,))
    o.store((acc * scale).to(q.dtype))
    fence_async_shared()
    put(dq, part_of(query_of(program_item(problem), problem, TILE_Q), PART, TILE_Q), o, 0, 1, HALF, D)
    tma.store_wait(0)


@gluon_kernel
def block_sparse_gluon_dq_kernel(
    lse, grad_lse, statistics,
    q_tile, q_run, g_tile, g_run, o_tile, o_run, k_tile, k_run, v_tile, v_run, dq_tile, dq_run,
    problem, distances, scale, tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dq [B, Nq, H, D] of one query block of one head.

    Args:
        lse, grad_lse: fp32 [B, H, Nq]; grad_lse is read if bit 2 of `present` is set.
        statistics: fp32 [B, H, 2 * query_blocks, 2, 64], written: LSE and delta of 64 slots each; see the module.
        g_tile, o_tile, ...: of the output's gradient and of the output; others as in `block_sparse_gluon_fwd_kernel`.
        distances: `copies.Distances` of q, g, o, k and v.
        scale: of the logits, in base e.
    """
    item = program_item(problem)
    q = head_read((q_tile, q_run), distances[0], item.sample, item.head)
    g = head_read((g_tile, g_run), distances[1], item.sample, item.head)
    o = head_read((o_tile, o_run), distances[2], item.sample, item.head)
    k = head_read((k_tile, k_run), distances[3], item.sample, item.head)
    v = head_read((v_tile, v_run), distances[4], item.sample, item.head)
    dq = head_written((dq_tile, dq_run), tokens, item.sample, item.head, D)
    head = over_samples(item.sample, item.head, problem).to(gl.int64)
    lse += head * tokens
    grad_lse += head * tokens
    statistics += head * (problem.queries.visual_blocks + problem.dense) * (4 * ROWS)
    buffers = allocated(q_run.dtype, D, STAGES, 3)
    gl.warp_specialize(
        [
            (produce, (q, g, o, k, v, problem, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (consume, (
                dq, lse, grad_lse, statistics, scale, problem, buffers,
                0, D, BLOCK_K, TILE_Q, HALF, STAGES,
            )),
            (consume, (
                dq, lse, grad_lse, statistics, scale, problem, buffers,
                1, D, BLOCK_K, TILE_Q, HALF, STAGES,
            )),
        ],
        [4, 4],
        [232, 232],
    )  # fmt: skip
