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
    over_samples,
    part_of,
    put,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.forward import attend_part, over_items, store_of_rows
from dit_accel.kernels.block_sparse.gluon.items import (
    allocated,
    give_no_values,
    take_no_values,
)
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
def produce_table(item, first, end, table, problem, buffers, D: gl.constexpr, STAGES: gl.constexpr):
    """The table of an item's head, which is a step without values."""
    full = buffers.k_full.index(end % STAGES)
    mbarrier.wait(buffers.k_empty.index(end % STAGES), (end // STAGES & 1) ^ 1)
    mbarrier.expect(full, D * D * 2)
    mbarrier.arrive(full, count=1)
    row = over_samples(item.sample, item.head, problem) * D
    copy_in(table, (row, 0), full, table_in(buffers, end, D, STAGES))
    give_no_values(end, buffers, STAGES)
    return end + 1


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
def attend_both(
    item, walk, others, tokens, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Both branches of a consumer's rows; for training also stores the exact one and its LSE by themselves."""
    exact_written, lse, sums = others[0], others[1], others[2]
    MAP: gl.constexpr = others[3]
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    q = buffers.q.index(PART)
    acc, row_lse, _share = attend_part(walk, scale, problem, buffers, PART, D, BLOCK_K, STAGES)
    x = q.load(A)
    where = part_of(query_of(item, problem, TILE_Q), PART, TILE_Q)
    if (problem.present & 4) != 0:
        store_of_rows(lse, row_lse, item, where, tokens, problem, HALF)
        q.store(acc.to(q.dtype))
        fence_async_shared()
        exact = head_written(exact_written, tokens, item.sample, item.head, D)
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
    return acc, where, end + 1


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
    over_items(
        ((q_tile, q_run), (k_tile, k_run), (v_tile, v_run), distances), (out_tile, out_run),
        table, ((exact_tile, exact_run), lse, sums, MAP), tokens, scale,
        problem, queue, allocated(q_run.dtype, D, STAGES), produce_table, attend_both, 216,
        D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
    )  # fmt: skip
