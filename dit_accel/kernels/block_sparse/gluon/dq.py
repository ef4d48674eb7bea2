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
    Addressed,
    Launched,
    Side,
    fetch,
    own_list,
    own_query,
    part_of,
    put,
    steps_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import (
    LOG2E,
    allocated,
    masked,
    produce_keys,
    rows_of_part,
    words_of,
)
from dit_accel.kernels.block_sparse.triton_tokens import RUNTIME


@gluon.jit
def produce(
    q, g, o, k, v, call, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: queries, gradients and outputs of both consumers, then keys and values."""
    where_q = own_query(call, TILE_Q)
    for part in gl.static_range(2):
        where = part_of(where_q, part, TILE_Q)
        full = buffers.q_full.index(part)
        mbarrier.expect(full, 3 * ROWS * D * 2)
        fetch(q, where, full, buffers.q.index(part), 0, 1, ROWS, HALF, D)
        fetch(g, where, full, buffers.q.index(2 + part), 0, 1, ROWS, HALF, D)
        fetch(o, where, full, buffers.q.index(4 + part), 0, 1, ROWS, HALF, D)
    produce_keys(k, v, call, buffers, D, BLOCK_K, TILE_K, STAGES)


@gluon.jit
def half_step(
    i, operand, acc, own, START: gl.constexpr, HALF: gl.constexpr, PART: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The sum with the half step before, unless this is the START; and ds [ROWS, ROWS] of 64 further keys.

    The scale and the LSE in `own` are in base 2.
    """
    q, g, row_lse, delta, scale, walk, call, buffers = own
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
    if i * (KEYS // BLOCK_K) + HALF // (BLOCK_K // 64) >= walk.pure:
        words = words_of(i, walk, call, PART, HALF, BLOCK_K, TILE_K, S)
        exponents = masked(exponents, words, words, S)
    weights = gl.exp2(exponents)
    # The branch in this wait keeps the assembler from moving the weights behind the wait for their gradients
    needed = i + HALF
    mbarrier.wait(buffers.k_full.index(needed % STAGES), needed // STAGES & 1, pred=needed < steps_of(walk, BLOCK_K))
    dp, weights = warpgroup_mma_wait(0, deps=(dp, weights))
    if HALF == 1:
        mbarrier.arrive(buffers.v_empty.index(stage), count=1)
    return gl.convert_layout((weights * (dp - delta[:, None])).to(q.dtype), P), acc


@gluon.jit
def consume(
    dq, lse, grad_lse, statistics, scale, call, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: LSE and delta of 64 query rows, then dq over the whole list."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    q, g, o = buffers.q.index(PART), buffers.q.index(2 + PART), buffers.q.index(4 + PART)
    rows, valid = rows_of_part(part_of(own_query(call, TILE_Q), PART, TILE_Q), call.queries, HALF, S)
    row_lse = gl.load(lse + rows, mask=valid, other=float("inf")) * LOG2E
    row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse)
    delta = gl.load(grad_lse + rows, mask=valid & ((call.given & 4) != 0), other=0.0)
    mbarrier.wait(buffers.q_full.index(PART), 0)
    products = gl.sum(o.load(A).to(gl.float32) * g.load(A).to(gl.float32), 1)
    delta = gl.convert_layout(products, gl.SliceLayout(1, S)) - delta
    unit = (call.query_blocks - 1 - gl.program_id(0)) * 2 + PART
    slots = unit * (2 * ROWS) + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    gl.store(statistics + slots, row_lse)
    gl.store(statistics + ROWS + slots, delta)

    walk = own_list(call)
    steps = steps_of(walk, BLOCK_K)
    own = q, g, row_lse, delta, scale * LOG2E, walk, call, buffers
    acc = gl.zeros([ROWS, D], gl.float32, A)
    if steps > 0:
        mbarrier.wait(buffers.k_full.index(0), 0)
        operand, acc = half_step(0, acc, acc, own, True, 0, PART, BLOCK_K, TILE_K, STAGES, S, P)
        for i in range(1, steps):
            operand, acc = half_step(i - 1, operand, acc, own, False, 1, PART, BLOCK_K, TILE_K, STAGES, S, P)
            operand, acc = half_step(i, operand, acc, own, False, 0, PART, BLOCK_K, TILE_K, STAGES, S, P)
        operand, acc = half_step(steps - 1, operand, acc, own, False, 1, PART, BLOCK_K, TILE_K, STAGES, S, P)
        last = buffers.k.index((steps - 1) % STAGES).slice(ROWS, ROWS, 0)
        summed = warpgroup_mma(operand, last, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(summed,))
    o.store((acc * scale).to(q.dtype))
    fence_async_shared()
    put(dq, part_of(own_query(call, TILE_Q), PART, TILE_Q), o, HALF, D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME)
def block_sparse_gluon_dq_kernel(
    lse, grad_lse, statistics,
    q_tile, q_run, g_tile, g_run, o_tile, o_run, k_tile, k_run, v_tile, v_run, dq_tile, dq_run,
    places, spans, words,
    visual_starts, conditioning_starts, text_starts, text_lens,
    usual_visual, usual_conditioning, usual_text, usual_length, given,
    q_batch, q_head, q_column, g_batch, g_head, g_column, o_batch, o_head, o_column,
    k_batch, k_head, k_column, v_batch, v_head, v_column,
    scale,
    T, H, W, tiles_h, tiles_w, visual, visual_blocks, conditioning, conditioning_blocks,
    QT, QH, QW, query_tiles_h, query_tiles_w, query_visual, query_visual_blocks,
    query_conditioning, query_conditioning_blocks,
    query_text, heads, query_tokens, query_blocks, width, per_head, shared_rows,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dq [B, Nq, H, D] of one query block of one head.

    Args:
        lse, grad_lse: fp32 [B, H, Nq]; grad_lse is read if bit 2 of `given` is set.
        statistics: fp32 [B, H, 2 * query_blocks, 2, 64], written: LSE and delta of 64 slots each; see the module.
        g_tile, o_tile, ...: of the output's gradient and of the output; others as in `block_sparse_gluon_fwd_kernel`.
        scale: of the logits, in base e.
    """
    i_h = gl.program_id(1)
    i_b = gl.program_id(2)
    keys = Side(T, H, W, tiles_h, tiles_w, visual, visual_blocks, conditioning, conditioning_blocks)
    queries = Side(
        QT, QH, QW, query_tiles_h, query_tiles_w, query_visual, query_visual_blocks, query_conditioning,
        query_conditioning_blocks,
    )  # fmt: skip
    call = Launched(
        places, spans, words, visual_starts, conditioning_starts, text_starts, text_lens,
        (usual_visual, usual_conditioning, usual_text, usual_length), given, queries, keys,
        query_text, heads, query_blocks, width, per_head, shared_rows,
    )  # fmt: skip
    q = Addressed(q_tile, q_run, i_b * q_batch + i_h * q_head, i_h * q_column)
    g = Addressed(g_tile, g_run, i_b * g_batch + i_h * g_head, i_h * g_column)
    o = Addressed(o_tile, o_run, i_b * o_batch + i_h * o_head, i_h * o_column)
    k = Addressed(k_tile, k_run, i_b * k_batch + i_h * k_head, i_h * k_column)
    v = Addressed(v_tile, v_run, i_b * v_batch + i_h * v_head, i_h * v_column)
    dq = Addressed(dq_tile, dq_run, i_b * query_tokens, i_h * D)
    head = (i_b * heads + i_h).to(gl.int64)
    lse += head * query_tokens
    grad_lse += head * query_tokens
    statistics += head * query_blocks * (4 * ROWS)
    buffers = allocated(q_run.dtype, D, STAGES, 3)
    gl.warp_specialize(
        [
            (produce, (q, g, o, k, v, call, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (consume, (
                dq, lse, grad_lse, statistics, scale, call, buffers,
                0, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
            )),
            (consume, (
                dq, lse, grad_lse, statistics, scale, call, buffers,
                1, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
            )),
        ],
        [4, 4],
        [232, 232],
    )  # fmt: skip
