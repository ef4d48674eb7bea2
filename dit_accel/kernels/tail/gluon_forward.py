"""The forward kernel with the tail of the Gluon implementation, for compute capability 9.0.

Producer and consumers are those of `block_sparse.gluon.forward`. Behind the listed keys the producer brings steps of
pseudo-keys into the same buffers, and writes a bias for each. Consumers go on with the same online softmax.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_accel.kernels.block_sparse.gluon.copies import (
    KEYS,
    RUN,
    copy_in,
    end_of,
    over_samples,
    part_of,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import attend_part, over_items, store_of_rows
from dit_accel.kernels.block_sparse.gluon.items import allocated
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
def produce_tail(item, first, end, tail, problem, buffers, D: gl.constexpr, STAGES: gl.constexpr):
    """An item's pseudo-keys, their values and their biases, in steps from `end` on. The tail is never empty."""
    pooled_k, pooled_v, pseudo, scale = tail
    head = over_samples(item.sample, item.head, problem)
    outside = pseudo.outside + (head * problem.queries.visual_blocks + item.block).to(gl.int64) * pseudo.blocks
    for i in range(gl.cdiv(pseudo.blocks, KEYS)):
        stage = (end + i) % STAGES
        phase = (end + i) // STAGES & 1
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
    return end + gl.cdiv(pseudo.blocks, KEYS)


@gluon.jit
def attend_with_tail(
    item, walk, others, tokens, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's rows over an item's list and the tail; stores their LSE and, with SHARE, the tail's share."""
    lse, share, steps = others[0], others[1], gl.cdiv(others[2], KEYS)
    SHARE: gl.constexpr = others[3]
    acc, row_lse, row_share = attend_part(
        walk, scale, problem, buffers, PART, D, BLOCK_K, STAGES, True, True, SHARE, steps
    )  # fmt: skip
    where = part_of(query_of(item, problem, TILE_Q), PART, TILE_Q)
    store_of_rows(lse, row_lse, item, where, tokens, problem, HALF)
    if SHARE:
        store_of_rows(share, row_share, item, where, tokens, problem, HALF)
    return acc, where, end_of(walk, BLOCK_K) + steps


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
    over_items(
        ((q_tile, q_run), (k_tile, k_run), (v_tile, v_run), distances), (out_tile, out_run),
        (pooled_k, pooled_v, pseudo, scale), (lse, share, pseudo.blocks, SHARE), tokens, scale,
        problem, queue, allocated(q_run.dtype, D, STAGES, 1, True), produce_tail, attend_with_tail, 216,
        D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
    )  # fmt: skip
