"""The forward kernel of the Gluon implementation, for compute capability 9.0: a producer and two consumers.

A program is one query block of 128 rows of one head. The producer (40 registers a thread) walks the block's list
and has the copy engine bring key and value tiles into shared memory. Two consumer warpgroups (232 registers a thread)
attend to the tiles, each for 64 of the rows. Barriers say which buffer is full and which is free.

The producer needs one warp and has four: it comes first, or the assembler spills what it computes before warps part.

The copy engine reads and writes rows through two kinds of descriptors of a tensor, which `launches` makes:

* a *tile* [1, t, h, w, D] lies at a frame, row and column of the grid. Slots beyond the grid are read as zeros and are
  not written. Its first axis counts rows of memory: it carries where a sample, a head and its visual tokens begin.
* a *run* [1, 1, rows, D] lies within a segment, whose end differs from sample to sample. Its first two axes wrap
  addresses around 2 ** 64, which bounds rows by that end, as in `triton.tools.ragged_tma`.

So no row outside a segment is read, whatever its memory holds, and grids need not fit the tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    corner_at,
    fetch,
    fetch_listed,
    head_read,
    head_written,
    over_samples,
    own_block,
    own_list,
    own_query,
    own_sample,
    part_of,
    place_at,
    put,
    steps_of,
)
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E, occupied
from dit_accel.kernels.jit import gluon_kernel


class Buffers(NamedTuple):
    """Shared memory: tiles, and for each a barrier that says it is full and one that says it is free.

    `words` go with the keys: of each half of a step, which slots of a block hold a token; see `put_words`.
    """

    q: Any
    k: Any
    v: Any
    words: Any
    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


@gluon.jit
def produce(
    q, k, v, problem, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: queries of both consumers, then `produce_keys`."""
    where_q = own_query(problem, TILE_Q)
    for part in gl.static_range(2):
        where = part_of(where_q, part, TILE_Q)
        mbarrier.expect(buffers.q_full.index(part), ROWS * D * 2)
        fetch(q, where, buffers.q_full.index(part), buffers.q.index(part), 0, 1, ROWS, HALF, D)
    produce_keys(k, v, problem, buffers, D, BLOCK_K, TILE_K, STAGES)


@gluon.jit
def put_words(i, near, far, walk, problem, buffers, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr):
    """Of each block of a step that needs bounds alone, which slots hold a token: a word for 64 slots, for all rows.

    The producer finds them while consumers multiply earlier steps. Beyond the list no slot holds a token.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    SPLIT: gl.constexpr = BLOCK_K // 64  # words of a block
    for half in gl.static_range(2):
        j = i * (KEYS // BLOCK_K) + half // SPLIT
        where = corner_at(near if half // SPLIT == 0 else far, walk.segments, problem.keys, BLOCK_K, TILE_K)
        word = gl.where(j < walk.listed.count, occupied(where, half % SPLIT * 64, problem.keys, TILE_K), 0)
        buffers.words.index(i % STAGES * 2 + half).store(gl.full([1], word, gl.int64, ONE))


@gluon.jit
def produce_keys(
    k, v, problem, buffers, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr
):
    """Keys and values of the listed blocks, in order."""
    walk = own_list(problem)
    near = place_at(0, 0, walk, BLOCK_K)
    far = place_at(0, KEYS // BLOCK_K - 1, walk, BLOCK_K)
    for i in range(steps_of(walk, BLOCK_K)):
        stage = i % STAGES
        phase = i // STAGES & 1
        next_near = place_at(i + 1, 0, walk, BLOCK_K)  # it takes longer to come than all that follows takes
        next_far = place_at(i + 1, KEYS // BLOCK_K - 1, walk, BLOCK_K)
        mbarrier.wait(buffers.k_empty.index(stage), phase ^ 1)
        mbarrier.expect(buffers.k_full.index(stage), KEYS * D * 2)
        if (i + 1) * (KEYS // BLOCK_K) > walk.listed.tabled:
            put_words(i, near, far, walk, problem, buffers, BLOCK_K, TILE_K, STAGES)
        mbarrier.arrive(buffers.k_full.index(stage), count=1)
        for part in gl.static_range(KEYS // BLOCK_K):
            place = near if part == 0 else far
            buffer = buffers.k.index(stage)
            fetch_listed(k, i, place, walk, problem, buffers.k_full.index(stage), buffer, part, BLOCK_K, TILE_K, D)
        mbarrier.wait(buffers.v_empty.index(stage), phase ^ 1)
        mbarrier.expect(buffers.v_full.index(stage), KEYS * D * 2)
        for part in gl.static_range(KEYS // BLOCK_K):
            place = near if part == 0 else far
            buffer = buffers.v.index(stage)
            fetch_listed(v, i, place, walk, problem, buffers.v_full.index(stage), buffer, part, BLOCK_K, TILE_K, D)
        near = next_near
        far = next_far


@gluon.jit
def words_of(
    i, walk, problem, buffers,
    PART: gl.constexpr, HALF: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Which slots of the HALF-th 64 of a step each row sees, as words: int64 [ROWS].

    Partial blocks have the words of `triton_tokens`, one for 64 slots of a row; others a word for all rows. The step's
    keys have arrived.
    """
    SPLIT: gl.constexpr = BLOCK_K // 64  # words of a block
    part: gl.constexpr = HALF // SPLIT
    j = i * (KEYS // BLOCK_K) + part
    words = gl.full([ROWS], -1, gl.int64, gl.SliceLayout(1, LAYOUT))
    if j >= walk.listed.pure:
        if j < walk.listed.tabled:
            number = ((walk.listed.number + j - walk.listed.pure) * SPLIT + HALF % SPLIT).to(gl.int64)
            rows = ROWS * PART + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            words = gl.load(problem.words + number * (2 * ROWS) + rows)
        else:
            word = buffers.words.index(i % STAGES * 2 + HALF).load(gl.SliceLayout(1, LAYOUT))
            words = gl.full([ROWS], 0, gl.int64, gl.SliceLayout(1, LAYOUT)) + word
    return words


@gluon.jit
def both_words(
    i, walk, problem, buffers,
    PART: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The words of both halves of a step, all ones if no block of it is masked."""
    low = gl.full([ROWS], -1, gl.int64, gl.SliceLayout(1, LAYOUT))
    high = low
    if (i + 1) * (KEYS // BLOCK_K) > walk.listed.pure:
        low = words_of(i, walk, problem, buffers, PART, 0, BLOCK_K, STAGES, LAYOUT)
        high = words_of(i, walk, problem, buffers, PART, 1, BLOCK_K, STAGES, LAYOUT)
    return low, high


@gluon.jit
def masked(scores, low, high, LAYOUT: gl.constexpr):
    """Scores [ROWS, up to KEYS], -inf where the bits of two words a row, int64 [ROWS] each, are 0."""
    slots = gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    word = gl.where(slots < 64, low[:, None], high[:, None])
    half = gl.where(slots % 64 < 32, word.to(gl.int32), (word >> 32).to(gl.int32))
    # the shift depends on the thread alone, the bit tested on the register alone
    seen = ((half >> (slots % 8)) & (1 << (slots % 32 // 8 * 8))) != 0
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def softmax_weights(x, m, l, scale):  # noqa: E741
    """Equation (5) in base 2 without its product: weights, the new m and l, and what earlier sums are multiplied by."""
    new_m = gl.maximum(m, gl.max(x, 1) * scale)
    # a row that has seen no key yet has m = -inf; any finite number keeps its weights at exp2(-inf) = 0
    finite_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    rescale = gl.exp2(m - finite_m)
    p = gl.exp2(x * scale - finite_m[:, None])
    return p, new_m, l * rescale + gl.sum(p, 1), rescale


@gluon.jit
def rows_of_part(where, side, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """A consumer's rows in memory, and which of its slots hold a token: int32 and bool [ROWS]."""
    slots = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    rows = where.place + slots
    valid = rows < where.size
    if HALF[1] > 0:
        t = where.t + slots // (HALF[1] * HALF[2])
        h = where.h + slots // HALF[2] % HALF[1]
        w = where.w + slots % HALF[2]
        rows = gl.where(where.is_visual, (t * side.H + h) * side.W + w, rows)
        valid = gl.where(where.is_visual, (t < side.T) & (h < side.H) & (w < side.W), valid)
    return where.first + rows, valid


@gluon.jit
def attend_part(
    walk, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 query rows over the whole list: output [ROWS, D] and LSE [ROWS], 0 and -inf without keys.

    A step's scores are multiplied while the step before is still being summed.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    PER_STEP: gl.constexpr = KEYS // BLOCK_K
    steps = steps_of(walk, BLOCK_K)
    q = buffers.q.index(PART)
    acc = gl.zeros([ROWS, D], gl.float32, A)
    zero = gl.zeros([ROWS, KEYS], gl.float32, S)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))  # noqa: E741
    mbarrier.wait(buffers.q_full.index(PART), 0)
    if steps > 0:
        mbarrier.wait(buffers.k_full.index(0), 0)
        scores = warpgroup_mma(q, buffers.k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        low, high = both_words(0, walk, problem, buffers, PART, BLOCK_K, STAGES, S)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(buffers.k_empty.index(0), count=1)
        if PER_STEP > walk.listed.pure:
            scores = masked(scores, low, high, S)
        p, m, l, rescale = softmax_weights(scores, m, l, scale)  # noqa: E741
        operand = gl.convert_layout(p.to(q.dtype), P)
        mbarrier.wait(buffers.k_full.index(1 % STAGES), 1 // STAGES & 1, pred=steps > 1)
        for i in range(1, steps):
            stage = i % STAGES
            before = (i - 1) % STAGES
            after = (i + 1) % STAGES
            scores = warpgroup_mma(q, buffers.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            low, high = both_words(i, walk, problem, buffers, PART, BLOCK_K, STAGES, S)  # they come meanwhile
            mbarrier.wait(buffers.v_full.index(before), (i - 1) // STAGES & 1)
            summed = warpgroup_mma(operand, buffers.v.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(buffers.k_empty.index(stage), count=1)
            if (i + 1) * PER_STEP > walk.listed.pure:
                scores = masked(scores, low, high, S)
            p, m, l, rescale = softmax_weights(scores, m, l, scale)  # noqa: E741
            # The branch in this wait keeps the assembler from moving the weights behind the wait for the sum
            mbarrier.wait(buffers.k_full.index(after), (i + 1) // STAGES & 1, pred=i + 1 < steps)
            acc, p, l = warpgroup_mma_wait(0, deps=(summed, p, l))  # noqa: E741
            mbarrier.arrive(buffers.v_empty.index(before), count=1)
            operand = gl.convert_layout(p.to(q.dtype), P)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, A))[:, None]
        last = (steps - 1) % STAGES
        mbarrier.wait(buffers.v_full.index(last), (steps - 1) // STAGES & 1)
        summed = warpgroup_mma(operand, buffers.v.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(summed,))
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    acc = acc / gl.convert_layout(safe, gl.SliceLayout(1, A))[:, None]
    return acc, gl.where(empty, float("-inf"), (m + gl.log2(safe)) / LOG2E)


@gluon.jit
def consume(
    out, lse, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 query rows over the whole list, then their output and LSE."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    acc, row_lse = attend_part(own_list(problem), scale, problem, buffers, PART, D, BLOCK_K, STAGES)
    where = part_of(own_query(problem, TILE_Q), PART, TILE_Q)
    rows, valid = rows_of_part(where, problem.queries, HALF, S)
    gl.store(lse + rows, row_lse, mask=valid)
    q = buffers.q.index(PART)
    q.store(acc.to(q.dtype))
    fence_async_shared()
    put(out, where, q, HALF, D)
    tma.store_wait(0)


@gluon.jit
def allocated(DTYPE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TENSORS: gl.constexpr = 1):
    """The buffers of a program, their barriers ready; TENSORS of queries, each of both consumers."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    buffers = Buffers(
        gl.allocate_shared_memory(DTYPE, [2 * TENSORS, ROWS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], SHARED),
        gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for part in gl.static_range(2):
        mbarrier.init(buffers.q_full.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(buffers.k_full.index(stage), count=2)
        mbarrier.init(buffers.v_full.index(stage), count=1)
        mbarrier.init(buffers.k_empty.index(stage), count=2)
        mbarrier.init(buffers.v_empty.index(stage), count=2)
    fence_async_shared()
    return buffers


@gluon_kernel
def block_sparse_gluon_fwd_kernel(
    lse, q_tile, q_run, k_tile, k_run, v_tile, v_run, out_tile, out_run, problem, distances, scale, tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of one query block of one head.

    Args:
        problem: `copies.GluonProblem`.
        distances: `copies.Distances` of q, k and v.
        scale: of the logits, above 0, in base 2.
        tokens: Nq.
        TILE_Q, TILE_K: tiles of query and key blocks, (0, 0, 0) for raster order; HALF is a consumer's part of TILE_Q.
    """
    _block, head = own_block(problem)
    q = head_read(q_tile, q_run, distances[0], own_sample(), head)
    k = head_read(k_tile, k_run, distances[1], own_sample(), head)
    v = head_read(v_tile, v_run, distances[2], own_sample(), head)
    out = head_written(out_tile, out_run, tokens, own_sample(), head, D)
    lse += over_samples(own_sample(), head, problem).to(gl.int64) * tokens
    buffers = allocated(q_run.dtype, D, STAGES)
    gl.warp_specialize(
        [
            (produce, (q, k, v, problem, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (consume, (out, lse, scale, problem, buffers, 0, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (consume, (out, lse, scale, problem, buffers, 1, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
        ],
        [4, 4],
        [232, 232],
    )
