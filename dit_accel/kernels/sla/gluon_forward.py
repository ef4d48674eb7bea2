"""The forward kernel of the Gluon implementation, for compute capability 9.0: both branches of a query block.

Producer and consumers are those of `block_sparse.gluon.forward`. The linear branch comes last. Behind the listed keys
the producer brings the table of the head into a buffer of keys. Each consumer multiplies it with phi of its rows.
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
    copy_in,
    end_of,
    head_written,
    item_at,
    list_of,
    over_samples,
    part_of,
    program_number,
    put,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import attend_part, rows_of_part
from dit_accel.kernels.block_sparse.gluon.items import (
    allocated,
    announce_end,
    announced,
    give_no_values,
    next_item,
    put_output,
    take_no_values,
)
from dit_accel.kernels.block_sparse.gluon.producer import produce_item
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E
from dit_accel.kernels.jit import gluon_kernel
from dit_accel.kernels.sla.arguments import EPSILON

EPS = gl.constexpr(EPSILON)


@gluon.jit
def table_in(buffers, steps, D: gl.constexpr, STAGES: gl.constexpr):
    """The buffer [D, D] of the table, which is the step of keys behind the last."""
    buffer = buffers.k.index(steps % STAGES)
    if D < KEYS:
        buffer = buffer.slice(0, D, 0)
    return buffer


@gluon.jit
def produce_both(
    q_tile, q_run, k_tile, k_run, v_tile, v_run, table, distances, problem, queue, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of each item queries, keys and values, then the table, which is a step without values."""
    number = program_number()
    turn = number * 0
    first = number * 0
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        end = produce_item(
            number, item, turn, first, q_tile, q_run, k_tile, k_run, v_tile, v_run, distances, problem, buffers,
            D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
        )  # fmt: skip
        full = buffers.k_full.index(end % STAGES)
        mbarrier.wait(buffers.k_empty.index(end % STAGES), (end // STAGES & 1) ^ 1)
        mbarrier.expect(full, D * D * 2)
        mbarrier.arrive(full, count=1)
        row = over_samples(item.sample, item.head, problem) * D
        copy_in(table, (row, 0), full, table_in(buffers, end, D, STAGES))
        give_no_values(end, buffers, STAGES)
        first = end + 1
        turn += 1
        number = next_item(queue)
    announce_end(number, turn, buffers)


@gluon.jit
def features(x, MAP: gl.constexpr):
    """phi of whole rows [ROWS, D], fp32."""
    x = x.to(gl.float32)
    if MAP == "softmax":
        x = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2E)
        x = x * (1.0 / gl.sum(x, 1))[:, None]
    elif MAP == "elu":
        x = gl.where(x > 0.0, x + 1.0, gl.exp2(gl.minimum(x, 0.0) * LOG2E))
    else:
        x = gl.maximum(x, 0.0)
    return x


@gluon.jit
def consume_both(
    out_tile, out_run, exact_tile, exact_run, lse, sums, tokens, scale, problem, queue, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: both branches of 64 query rows; for training the exact one and its LSE by themselves."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    number = announced(0, buffers, PART)
    turn = number * 0
    first = number * 0
    q = buffers.q.index(PART)
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        walk = list_of(item, first, problem, BLOCK_K)
        acc, row_lse, _share = attend_part(walk, scale, problem, buffers, PART, D, BLOCK_K, STAGES)
        x = q.load(A)
        where = part_of(query_of(item, problem, TILE_Q), PART, TILE_Q)
        if (problem.present & 4) != 0:
            rows, valid = rows_of_part(where, problem.queries, HALF, S)
            head_lse = lse + over_samples(item.sample, item.head, problem).to(gl.int64) * tokens
            gl.store(head_lse + rows, row_lse, mask=valid)
            q.store(acc.to(q.dtype))
            fence_async_shared()
            exact = head_written(exact_tile, exact_run, tokens, item.sample, item.head, D)
            put(exact, where, q, 0, 1, HALF, D)
        phi = features(x, MAP).to(q.dtype)
        columns = gl.arange(0, D, gl.SliceLayout(0, A))
        head_sums = sums + over_samples(item.sample, item.head, problem) * (2 * D + 1)
        divisor = gl.sum(phi.to(gl.float32) * gl.load(head_sums + columns)[None, :], 1) + EPS
        end = end_of(walk, BLOCK_K)
        mbarrier.wait(buffers.k_full.index(end % STAGES), end // STAGES & 1)
        zero = gl.zeros([ROWS, D], gl.float32, A)
        table = table_in(buffers, end, D, STAGES)
        branch = warpgroup_mma(gl.convert_layout(phi, P), table, zero, use_acc=False, is_async=True)
        branch = warpgroup_mma_wait(0, deps=(branch,))
        if (problem.present & 4) != 0:
            tma.store_wait(0)
        mbarrier.arrive(buffers.q_empty.index(0), count=1)
        take_no_values(end, buffers, STAGES)
        factor = gl.load(head_sums + 2 * D)
        acc += branch * (factor / divisor)[:, None] + gl.load(head_sums + D + columns)[None, :]
        first = end + 1
        out = head_written(out_tile, out_run, tokens, item.sample, item.head, D)
        put_output(acc, out, where, first, turn, buffers, PART, D, HALF, STAGES)
        turn += 1
        number = announced(turn, buffers, PART)
    tma.store_wait(0)


@gluon_kernel
def sparse_linear_gluon_fwd_kernel(
    lse, q_tile, q_run, k_tile, k_run, v_tile, v_run, out_tile, out_run, exact_tile, exact_run, table,
    sums, problem, queue, distances, scale, tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """Output [B, N, H, D] of the items that this program takes, scope "all"; for training also what the backward reads.

    Arguments as in `block_sparse_gluon_fwd_kernel` and `triton_forward.sparse_linear_fwd_kernel`. The table is
    [B * H * D, D]. sums are fp32 [B, H, 2 D + 1]: the sum of phi(k), the bias, and the table's factor.
    Bit 2 of `present` says that this is training.
    """
    buffers = allocated(q_run.dtype, D, STAGES)
    gl.warp_specialize(
        [
            (produce_both, (
                q_tile, q_run, k_tile, k_run, v_tile, v_run, table, distances, problem, queue, buffers,
                D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
            )),
            (consume_both, (
                out_tile, out_run, exact_tile, exact_run, lse, sums, tokens, scale, problem, queue, buffers,
                0, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES, MAP,
            )),
            (consume_both, (
                out_tile, out_run, exact_tile, exact_run, lse, sums, tokens, scale, problem, queue, buffers,
                1, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES, MAP,
            )),
        ],
        [4, 4],
        [216, 216],
    )  # fmt: skip
