"""The forward kernel with the tail of the Gluon implementation, for compute capability 9.0.

Producer and consumers are those of `block_sparse.gluon.forward`. Behind the listed keys the producer brings steps of
pseudo-keys into the same buffers, and writes a bias for each. Consumers go on with the same online softmax.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dit_accel.kernels.block_sparse.gluon.copies import (
    KEYS,
    RUN,
    copy_in,
    end_of,
    head_written,
    item_at,
    list_of,
    over_samples,
    part_of,
    program_number,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import attend_part, rows_of_part
from dit_accel.kernels.block_sparse.gluon.items import allocated, announce_end, announced, next_item, put_output
from dit_accel.kernels.block_sparse.gluon.producer import produce_item
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E
from dit_accel.kernels.jit import gluon_kernel


@gluon.jit
def biases_of(i, outside, pseudo, scale):
    """What is added to the scores of a step before scaling; -inf where a block is not in the tail: fp32 [KEYS].

    `outside`: the query block's row of the map.
    """
    columns = i * KEYS + gl.arange(0, KEYS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    skipped = gl.load(outside + columns, mask=columns < pseudo.blocks, other=1)
    logs = gl.load(pseudo.logs + columns, mask=columns < pseudo.blocks, other=0.0)
    return gl.where(skipped == 0, logs * (LOG2E / scale), float("-inf"))


@gluon.jit
def produce_tail(
    item, first, pooled_k, pooled_v, pseudo, scale, problem, buffers, D: gl.constexpr, STAGES: gl.constexpr
):
    """An item's pseudo-keys, their values and their biases, in steps from `first` on."""
    head = over_samples(item.sample, item.head, problem)
    outside = pseudo.outside + (head * problem.queries.visual_blocks + item.block).to(gl.int64) * pseudo.blocks
    for i in range(gl.cdiv(pseudo.blocks, KEYS)):
        stage = (first + i) % STAGES
        phase = (first + i) // STAGES & 1
        run = (RUN, (head + 1) * pseudo.blocks, RUN - pseudo.blocks + i * KEYS, 0)
        biases = biases_of(i, outside, pseudo, scale)  # it takes longer to come than all that follows takes
        mbarrier.wait(buffers.k_empty.index(stage), phase ^ 1)
        mbarrier.expect(buffers.k_full.index(stage), KEYS * D * 2)
        buffers.biases.index(stage).store(biases)
        mbarrier.arrive(buffers.k_full.index(stage), count=1)
        copy_in(pooled_k, run, buffers.k_full.index(stage), buffers.k.index(stage).reshape([1, 1, KEYS, D]))
        mbarrier.wait(buffers.v_empty.index(stage), phase ^ 1)
        mbarrier.expect(buffers.v_full.index(stage), KEYS * D * 2)
        copy_in(pooled_v, run, buffers.v_full.index(stage), buffers.v.index(stage).reshape([1, 1, KEYS, D]))


@gluon.jit
def produce_with_tail(
    q_tile, q_run, k_tile, k_run, v_tile, v_run, pooled_k, pooled_v, pseudo, distances, scale, problem, queue, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of each item queries, listed keys and values, then the tail, which is never empty."""
    number = program_number()
    turn = number * 0
    first = number * 0
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        end = produce_item(
            number, item, turn, first, q_tile, q_run, k_tile, k_run, v_tile, v_run, distances, problem, buffers,
            D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
        )  # fmt: skip
        produce_tail(item, end, pooled_k, pooled_v, pseudo, scale, problem, buffers, D, STAGES)
        first = end + gl.cdiv(pseudo.blocks, KEYS)
        turn += 1
        number = next_item(queue)
    announce_end(number, turn, buffers)


@gluon.jit
def consume_with_tail(
    out_tile, out_run, lse, share, blocks, tokens, scale, problem, queue, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 query rows of each item over its list and the tail, then output, LSE and share."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    number = announced(0, buffers, PART)
    turn = number * 0
    first = number * 0
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        walk = list_of(item, first, problem, BLOCK_K)
        acc, row_lse, row_share = attend_part(
            walk, scale, problem, buffers, PART, D, BLOCK_K, STAGES, True, True, SHARE, gl.cdiv(blocks, KEYS)
        )  # fmt: skip
        where = part_of(query_of(item, problem, TILE_Q), PART, TILE_Q)
        rows, valid = rows_of_part(where, problem.queries, HALF, S)
        head = over_samples(item.sample, item.head, problem).to(gl.int64) * tokens
        gl.store(lse + head + rows, row_lse, mask=valid)
        if SHARE:
            gl.store(share + head + rows, row_share, mask=valid)
        out = head_written(out_tile, out_run, tokens, item.sample, item.head, D)
        first = end_of(walk, BLOCK_K) + gl.cdiv(blocks, KEYS)
        put_output(acc, out, where, first, turn, buffers, PART, D, HALF, STAGES)
        turn += 1
        number = announced(turn, buffers, PART)
    tma.store_wait(0)


@gluon_kernel
def tail_gluon_fwd_kernel(
    lse, share, q_tile, q_run, k_tile, k_run, v_tile, v_run, out_tile, out_run, pooled_k, pooled_v,
    pseudo, problem, queue, distances, scale, tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] and LSE [B, H, N] of the items that this program takes, the tail included.

    Arguments as in `block_sparse_gluon_fwd_kernel`, and:

    Args:
        share: fp32 [B, H, N], written with SHARE: the share of the tail in a row's weights.
        pooled_k, pooled_v: descriptors of runs of `pseudo.k` and `pseudo.v`, KEYS rows each.
        pseudo: `records.PseudoKeys`.
    """
    buffers = allocated(q_run.dtype, D, STAGES, 1, True)
    gl.warp_specialize(
        [
            (produce_with_tail, (
                q_tile, q_run, k_tile, k_run, v_tile, v_run, pooled_k, pooled_v, pseudo, distances, scale, problem,
                queue, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
            )),
            (consume_with_tail, (
                out_tile, out_run, lse, share, pseudo.blocks, tokens, scale, problem, queue, buffers,
                0, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES, SHARE,
            )),
            (consume_with_tail, (
                out_tile, out_run, lse, share, pseudo.blocks, tokens, scale, problem, queue, buffers,
                1, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES, SHARE,
            )),
        ],
        [4, 4],
        [216, 216],
    )  # fmt: skip
