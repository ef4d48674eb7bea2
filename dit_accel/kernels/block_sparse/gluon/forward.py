"""The forward kernel of the Gluon implementation, for compute capability 9.0: a producer and two consumers.

An item is one query block of 128 rows of one head. A launch has a program for each multiprocessor, which takes items
in turn (`items.Queue`). The producer (56 registers a thread) walks the item's list and has the copy engine bring key
and value tiles into shared memory. Two consumer warpgroups (224 registers a thread) attend to the tiles, each for 64
of the rows. Barriers say which buffer is full and which is free.

The producer is ahead of the consumers by as many steps as there are buffers, also into the next item. It waits for the
queries' buffer alone, which consumers leave when they have multiplied the item's last keys.

The producer needs one warp and has four: it comes first, or the assembler spills what it computes before warps part.

The copy engine reads and writes rows through two kinds of descriptors of a tensor, which `launches` makes:

* a *tile* [1, t, h, w, D] lies at a frame, row and column of the grid. Slots beyond the grid are read as zeros and are
  not written. Its first axis counts rows of memory: it carries where a sample, a head and its visual tokens begin.
* a *run* [1, 1, rows, D] lies within a segment, whose end differs from sample to sample. Its first two axes wrap
  addresses around 2 ** 64, which bounds rows by that end, as in `triton.tools.ragged_tma`.

So no row outside a segment is read, whatever its memory holds, and grids need not fit the tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from dit_accel.kernels.block_sparse.gluon.copies import (
    KEYS,
    ROWS,
    end_of,
    head_written,
    item_at,
    list_of,
    over_samples,
    part_of,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.items import (
    allocated,
    announced,
    free_output,
    give_no_values,
    put_output,
    take_no_values,
)
from dit_accel.kernels.block_sparse.gluon.producer import produce_items
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E
from dit_accel.kernels.jit import gluon_kernel


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
def is_masked(i, walk, BLOCK_K: gl.constexpr, TAIL: gl.constexpr):
    """Whether a block of a step is masked. Steps of pseudo-keys have biases instead."""
    masked_step = (i + 1) * (KEYS // BLOCK_K) > walk.listed.pure
    if TAIL:
        masked_step &= i < end_of(walk, BLOCK_K)
    return masked_step


@gluon.jit
def both_words(
    i, walk, problem, buffers,
    PART: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The words of both halves of a step, all ones if no block of it is masked."""
    low = gl.full([ROWS], -1, gl.int64, gl.SliceLayout(1, LAYOUT))
    high = low
    if is_masked(i, walk, BLOCK_K, TAIL):
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
def biased(
    scores, i, walk, buffers,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Scores [ROWS, KEYS]; in a step of pseudo-keys with their biases, which go with the keys' buffer."""
    if TAIL:
        if i >= end_of(walk, BLOCK_K):
            scores += buffers.biases.index(i % STAGES).load(gl.SliceLayout(0, LAYOUT))[None, :]
    return scores


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
def release_keys(i, end, buffers, STAGES: gl.constexpr, KEEP: gl.constexpr):
    """A step's keys are multiplied; to KEEP the last ones, the queries are free instead."""
    if KEEP:
        mbarrier.arrive(buffers.k_empty.index(i % STAGES), count=1, pred=i + 1 < end)
        mbarrier.arrive(buffers.q_empty.index(0), count=1, pred=i + 1 == end)
    else:
        mbarrier.arrive(buffers.k_empty.index(i % STAGES), count=1)


@gluon.jit
def attend_part(
    walk, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, KEEP: gl.constexpr = False,
    TAIL: gl.constexpr = False, SHARE: gl.constexpr = False, pooled=0,
):  # fmt: skip
    """A consumer's 64 query rows over the whole list: output [ROWS, D] and LSE [ROWS], 0 and -inf without keys.

    The TAIL has `pooled` further steps of KEYS pseudo-keys. The third result, with SHARE, is its share of a row's
    weights, fp32 [ROWS].

    A step's scores are multiplied while the step before is still being summed. To KEEP the last keys' buffer
    for the caller, their release is that of the queries.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    first = walk.first
    end = end_of(walk, BLOCK_K)
    if TAIL:
        end += pooled
    q = buffers.q.index(PART)
    acc = gl.zeros([ROWS, D], gl.float32, A)
    zero = gl.zeros([ROWS, KEYS], gl.float32, S)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))  # noqa: E741
    listed = l  # the part of l that listed keys have
    if end > first:
        mbarrier.wait(buffers.k_full.index(first % STAGES), first // STAGES & 1)
        keys = buffers.k.index(first % STAGES)
        scores = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
        low, high = both_words(first, walk, problem, buffers, PART, BLOCK_K, STAGES, S, TAIL)
        free_output(first, buffers, STAGES)
        scores = biased(warpgroup_mma_wait(0, deps=(scores,)), first, walk, buffers, BLOCK_K, STAGES, S, TAIL)
        release_keys(first, end, buffers, STAGES, KEEP)
        if is_masked(first, walk, BLOCK_K, TAIL):
            scores = masked(scores, low, high, S)
        p, m, l, rescale = softmax_weights(scores, m, l, scale)  # noqa: E741
        if SHARE:
            listed = gl.where(first < end_of(walk, BLOCK_K), l, listed)
        operand = gl.convert_layout(p.to(q.dtype), P)
        mbarrier.wait(buffers.k_full.index((first + 1) % STAGES), (first + 1) // STAGES & 1, pred=first + 1 < end)
        for i in range(first + 1, end):
            stage = i % STAGES
            before = (i - 1) % STAGES
            after = (i + 1) % STAGES
            scores = warpgroup_mma(q, buffers.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            low, high = both_words(i, walk, problem, buffers, PART, BLOCK_K, STAGES, S, TAIL)  # they come meanwhile
            mbarrier.wait(buffers.v_full.index(before), (i - 1) // STAGES & 1)
            summed = warpgroup_mma(operand, buffers.v.index(before), acc, is_async=True)
            scores = biased(warpgroup_mma_wait(1, deps=(scores,)), i, walk, buffers, BLOCK_K, STAGES, S, TAIL)
            release_keys(i, end, buffers, STAGES, KEEP)
            if is_masked(i, walk, BLOCK_K, TAIL):
                scores = masked(scores, low, high, S)
            p, m, l, rescale = softmax_weights(scores, m, l, scale)  # noqa: E741
            if SHARE:
                listed = gl.where(i < end_of(walk, BLOCK_K), l, listed * rescale)
            # The branch in this wait keeps the assembler from moving the weights behind the wait for the sum
            mbarrier.wait(buffers.k_full.index(after), (i + 1) // STAGES & 1, pred=i + 1 < end)
            acc, p, l = warpgroup_mma_wait(0, deps=(summed, p, l))  # noqa: E741
            mbarrier.arrive(buffers.v_empty.index(before), count=1)
            operand = gl.convert_layout(p.to(q.dtype), P)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, A))[:, None]
        last = (end - 1) % STAGES
        mbarrier.wait(buffers.v_full.index(last), (end - 1) // STAGES & 1)
        summed = warpgroup_mma(operand, buffers.v.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(summed,))
        mbarrier.arrive(buffers.v_empty.index(last), count=1)
    else:
        free_output(first, buffers, STAGES)
        if KEEP:
            mbarrier.wait(buffers.k_full.index(first % STAGES), first // STAGES & 1)
            mbarrier.arrive(buffers.q_empty.index(0), count=1)
            take_no_values(first, buffers, STAGES)
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    acc = acc / gl.convert_layout(safe, gl.SliceLayout(1, A))[:, None]
    return acc, gl.where(empty, float("-inf"), (m + gl.log2(safe)) / LOG2E), 1.0 - gl.where(empty, 1.0, listed / safe)


@gluon.jit
def store_of_rows(x, values, item, where, tokens, problem, HALF: gl.constexpr):
    """Store a number for each of a consumer's rows, fp32 [ROWS], to x [B, H, tokens]."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    rows, valid = rows_of_part(where, problem.queries, HALF, S)
    head = x + over_samples(item.sample, item.head, problem).to(gl.int64) * tokens
    gl.store(head + rows, values, mask=valid)


@gluon.jit
def consume_items(
    written, others, tokens, scale, problem, queue, buffers,
    ATTEND: gl.constexpr, PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr,
    HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 query rows of each item.

    ATTEND returns their output [ROWS, D], where they lie, and the number of the next item's first step.
    """
    number = announced(0, buffers, PART)
    turn = number * 0
    first = number * 0
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        walk = list_of(item, first, problem, BLOCK_K)
        acc, where, first = ATTEND(
            item, walk, others, tokens, scale, problem, buffers, PART, D, BLOCK_K, TILE_Q, HALF, STAGES
        )  # fmt: skip
        out = head_written(written, tokens, item.sample, item.head, D)
        put_output(acc, out, where, first, turn, buffers, PART, D, HALF, STAGES)
        turn += 1
        number = announced(turn, buffers, PART)
    tma.store_wait(0)


@gluon.jit
def over_items(
    read, written, behind, others, tokens, scale, problem, queue, buffers,
    PRODUCE_BEHIND: gl.constexpr, ATTEND: gl.constexpr, REGISTERS: gl.constexpr,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A producer, see `produce_items`, and two consumers with REGISTERS a thread, see `consume_items`.

    Args:
        read: pairs of descriptors, of q, k and v, then their `copies.Distances`.
        written: the pair of descriptors of the output.
        behind, others: what PRODUCE_BEHIND and ATTEND read and write besides.
    """
    gl.warp_specialize(
        [
            (produce_items, (
                read, behind, problem, queue, buffers, PRODUCE_BEHIND, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
            )),
            (consume_items, (
                written, others, tokens, scale, problem, queue, buffers, ATTEND,
                0, D, BLOCK_K, TILE_Q, HALF, STAGES,
            )),
            (consume_items, (
                written, others, tokens, scale, problem, queue, buffers, ATTEND,
                1, D, BLOCK_K, TILE_Q, HALF, STAGES,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def produce_nothing(item, first, end, behind, problem, buffers, D: gl.constexpr, STAGES: gl.constexpr):
    """An empty list has a step without keys: its buffer is the output's."""
    if end == first:
        mbarrier.wait(buffers.k_empty.index(end % STAGES), (end // STAGES & 1) ^ 1)
        mbarrier.arrive(buffers.k_full.index(end % STAGES), count=2)
        give_no_values(end, buffers, STAGES)
        end += 1
    return end


@gluon.jit
def attend_list(
    item, walk, others, tokens, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's rows over an item's whole list; stores their LSE."""
    acc, row_lse, _share = attend_part(walk, scale, problem, buffers, PART, D, BLOCK_K, STAGES, True)
    where = part_of(query_of(item, problem, TILE_Q), PART, TILE_Q)
    store_of_rows(others[0], row_lse, item, where, tokens, problem, HALF)
    return acc, where, gl.maximum(end_of(walk, BLOCK_K), walk.first + 1)


@gluon_kernel
def block_sparse_gluon_fwd_kernel(
    lse, q_tile, q_run, k_tile, k_run, v_tile, v_run, out_tile, out_run, problem, queue, distances, scale, tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of the items that this program takes, a query block of one head each.

    Args:
        problem: `copies.GluonProblem`.
        queue: `items.Queue`, from which all programs take items.
        distances: `copies.Distances` of q, k and v.
        scale: of the logits, above 0, in base 2.
        tokens: Nq.
        TILE_Q, TILE_K: tiles of query and key blocks, (0, 0, 0) for raster order; HALF is a consumer's part of TILE_Q.
    """
    over_items(
        ((q_tile, q_run), (k_tile, k_run), (v_tile, v_run), distances), (out_tile, out_run), (), (lse,), tokens, scale,
        problem, queue, allocated(q_run.dtype, D, STAGES), produce_nothing, attend_list, 224,
        D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES,
    )  # fmt: skip
