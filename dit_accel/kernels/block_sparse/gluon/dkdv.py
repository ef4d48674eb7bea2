"""The kernel of dk and dv of the Gluon implementation, for compute capability 9.0; see `forward`.

A program is one key block of one head. The producer walks the transposed list of query blocks, and brings queries
and output gradients in units of 64 rows. A unit has four products. Scores and the weights' gradients are computed with
keys as rows, so that both are operands in registers of the products that make dv and dk.

Consumers divide a block of 128 keys, and both take every unit. They divide the units of a block of 64 keys, and add
their sums at the end: each gives one of its two to the other.
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
    ROWS,
    corner_at,
    fetch,
    head_read,
    head_written,
    over_samples,
    part_of,
    program_key_block,
    program_query_segments,
    program_segments,
    put,
)
from dit_accel.kernels.block_sparse.triton_tokens import LOG2E
from dit_accel.kernels.jit import gluon_kernel
from dit_accel.kernels.records import Corner, SegmentRows


class KeyBuffers(NamedTuple):
    """Shared memory: own keys and values, units of queries and gradients, sums to be exchanged; and their barriers."""

    k: Any
    v: Any
    q: Any
    g: Any
    sums: Any
    keys_full: Any
    full: Any
    empty: Any
    sums_full: Any


class KeyVisits(NamedTuple):
    """The query blocks that visit a key block, `triton_lists.Transposed`: `clean` ends the part without padding."""

    entries: Any
    places: Any
    numbers: Any
    first: Any
    clean: Any
    last: Any


@gluon.jit
def program_keys(problem, text, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr):
    """Where this program's key block lies in a segment of `text` tokens, if it is one of text."""
    visual_start, conditioning_start, text_start, _text_len = program_segments(problem)
    segments = SegmentRows(visual_start, conditioning_start, text_start, text)
    block, _head = program_key_block(problem)
    return corner_at(block, segments, problem.keys, BLOCK_K, TILE_K)


@gluon.jit
def query_at(place, is_clean, segments, problem, PART: gl.constexpr, TILE_Q: gl.constexpr):
    """Where half a listed query block lies. A block without padding slots costs no division."""
    t, h, w, slot = place * 0, place * 0, place * 0, place
    first, size, is_visual = segments.visual_start, problem.queries.visual, place >= 0
    if TILE_Q[1] > 0:
        first += place
        slot = place * 0
    if is_clean == 0:
        where = corner_at(place, segments, problem.queries, 2 * ROWS, TILE_Q)
        t, h, w, slot = where.t, where.h, where.w, where.place
        first, size, is_visual = where.first, where.size, where.is_visual
    return part_of(Corner(is_visual, t, h, w, first, size, slot), PART, TILE_Q)


@gluon.jit
def produce(
    q, g, k, v, visits, text_len, problem, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    PART_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: own keys and values, then the units of the listed query blocks, in order."""
    mbarrier.expect(buffers.keys_full.index(0), 2 * BLOCK_K * D * 2)
    for part in gl.static_range(BLOCK_K // ROWS):
        where = part_of(program_keys(problem, text_len, BLOCK_K, TILE_K), part, TILE_K)
        fetch(k, where, buffers.keys_full.index(0), buffers.k.index(part), 0, 1, ROWS, PART_K, D)
        fetch(v, where, buffers.keys_full.index(0), buffers.v.index(part), 0, 1, ROWS, PART_K, D)
    segments = program_query_segments(problem)
    place = gl.load(visits.places + gl.maximum(gl.minimum(visits.first, visits.last - 1), 0))
    for i in range(visits.first, visits.last):
        next_place = gl.load(visits.places + gl.minimum(i + 1, visits.last - 1))
        for part in gl.static_range(2):
            unit = 2 * (i - visits.first) + part
            stage = unit % STAGES
            full = buffers.full.index(stage)
            where = query_at(place, (i < visits.clean).to(gl.int32), segments, problem, part, TILE_Q)
            mbarrier.wait(buffers.empty.index(stage), (unit // STAGES & 1) ^ 1)
            mbarrier.expect(full, 2 * ROWS * D * 2)
            fetch(q, where, full, buffers.q.index(stage), 0, 1, ROWS, HALF, D)
            fetch(g, where, full, buffers.g.index(stage), 0, 1, ROWS, HALF, D)
        place = next_place


@gluon.jit
def seen_by(scores, words, zero, S: gl.constexpr):
    """Scores [ROWS keys, ROWS queries], -inf where a query's word, int64 [ROWS], lacks a key's bit.

    `zero` looks like a new number, which keeps the assembler from holding shifts in registers for all turns.
    """
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, S))[:, None]
    half = gl.where(rows < 32, words[None, :].to(gl.int32), (words >> 32)[None, :].to(gl.int32))
    # the shift depends on the thread alone, the bit tested on the register alone
    seen = ((half >> (rows // 16 % 2 * 16 + rows % 8 + zero)) & (1 << (rows % 16 // 8 * 8))) != 0
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def turn(
    n, seen, operand, dk, dv, block, visits, statistics, scale, problem, buffers,
    START: gl.constexpr, PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums with the unit before, unless this is the START; weights and ds [ROWS keys, ROWS queries] of the next.

    `scale` is in base 2.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    STRIDE: gl.constexpr = 128 // BLOCK_K  # from unit to unit of this consumer
    BUFFER: gl.constexpr = PART * (2 - STRIDE)  # which of the key buffers it has
    unit = n * STRIDE + PART * (STRIDE - 1)
    stage, before, after = unit % STAGES, (unit - STRIDE) % STAGES, unit + STRIDE
    zero = gl.zeros([ROWS, ROWS], gl.float32, S)
    # block >> 31 is 0; an index that looks new keeps the assembler from holding 16 addresses in registers
    k, v = buffers.k.index(BUFFER + (block >> 31)), buffers.v.index(BUFFER + (block >> 31))
    entry = visits.first + unit // 2
    block = gl.load(visits.entries + entry)
    number = gl.load(visits.numbers + entry, mask=(problem.present & 4) != 0, other=-1)
    if not START:
        dv_sum = warpgroup_mma(seen, buffers.g.index(before), dv, is_async=True)
        dk_sum = warpgroup_mma(operand, buffers.q.index(before), dk, is_async=True)
    scores = warpgroup_mma(k, buffers.q.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if not START:
        dv, dk = warpgroup_mma_wait(1, deps=(dv_sum, dk_sum))
        mbarrier.arrive(buffers.empty.index(before), count=1)
    dp = warpgroup_mma(v, buffers.g.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    columns = unit % 2 * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, S))
    lse = statistics + block * (4 * ROWS) + unit % 2 * ROWS + columns
    exponents = scores * scale - gl.load(lse)[None, :]
    if number >= 0:
        word = number.to(gl.int64) * (BLOCK_K // 64) + BUFFER
        exponents = seen_by(exponents, gl.load(problem.words + word * (2 * ROWS) + columns), block >> 31, S)
    weights = gl.exp2(exponents)
    # The branch in this wait keeps the assembler from moving the weights behind the wait for their gradients
    mbarrier.wait(buffers.full.index(after % STAGES), after // STAGES & 1, pred=after // 2 < visits.last - visits.first)
    dp, weights = warpgroup_mma_wait(0, deps=(dp, weights))
    ds = weights * (dp - gl.load(lse + ROWS)[None, :])
    return gl.convert_layout(weights.to(k.dtype), P), gl.convert_layout(ds.to(k.dtype), P), dk, dv, block


@gluon.jit
def summed(
    visits, statistics, scale, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's sums over its units: dk / scale and dv, fp32 [ROWS, D] each."""
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    STRIDE: gl.constexpr = 128 // BLOCK_K
    FIRST: gl.constexpr = PART * (STRIDE - 1)
    dk = gl.zeros([ROWS, D], gl.float32, A)
    dv = gl.zeros([ROWS, D], gl.float32, A)
    base_2 = scale * LOG2E
    turns = (visits.last - visits.first) * (2 // STRIDE)
    mbarrier.wait(buffers.keys_full.index(0), 0)
    if turns > 0:
        mbarrier.wait(buffers.full.index(FIRST), 0)
        seen, operand, dk, dv, block = turn(
            0, dv, dk, dk, dv, turns * 0, visits, statistics, base_2, problem, buffers, True, PART, D, BLOCK_K, STAGES
        )  # fmt: skip
        for n in range(1, turns):
            seen, operand, dk, dv, block = turn(
                n, seen, operand, dk, dv, block, visits, statistics, base_2, problem, buffers,
                False, PART, D, BLOCK_K, STAGES,
            )  # fmt: skip
        last = (turns * STRIDE - STRIDE + FIRST) % STAGES
        dv_sum = warpgroup_mma(seen, buffers.g.index(last), dv, is_async=True)
        dk_sum = warpgroup_mma(operand, buffers.q.index(last), dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, deps=(dv_sum, dk_sum))
    return dk, dv


@gluon.jit
def write(
    x, values, buffer, text_len, problem,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, PART_K: gl.constexpr,
):  # fmt: skip
    """Write gradients of 64 keys, through a buffer that nothing reads any more. Text that is no key has 0."""
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    where = part_of(program_keys(problem, text_len, BLOCK_K, TILE_K), PART, TILE_K)
    slots = where.place + gl.arange(0, ROWS, gl.SliceLayout(1, A))
    values = gl.where((where.is_visual | (slots < where.size))[:, None], values, 0.0)
    buffer.store(values.to(buffer.dtype))
    fence_async_shared()
    put(
        x, part_of(program_keys(problem, problem.usual.text_len, BLOCK_K, TILE_K), PART, TILE_K),
        buffer, 0, 1, PART_K, D,
    )  # fmt: skip


@gluon.jit
def consume(
    dk, dv, visits, statistics, scale, text_len, problem, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, PART_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: its sums, exchanged if both have the same keys, then the gradients."""
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    sum_k, sum_v = summed(visits, statistics, scale, problem, buffers, PART, D, BLOCK_K, STAGES)
    if BLOCK_K == ROWS:
        buffers.sums.index(PART).store(sum_v if PART == 0 else sum_k)
        mbarrier.arrive(buffers.sums_full.index(PART), count=1)
        mbarrier.wait(buffers.sums_full.index(1 - PART), 0)
        other = buffers.sums.index(1 - PART).load(A)
        if PART == 0:
            write(dk, (sum_k + other) * scale, buffers.k.index(0), text_len, problem, 0, D, BLOCK_K, TILE_K, PART_K)
        else:
            write(dv, other + sum_v, buffers.v.index(0), text_len, problem, 0, D, BLOCK_K, TILE_K, PART_K)
    else:
        write(dk, sum_k * scale, buffers.k.index(PART), text_len, problem, PART, D, BLOCK_K, TILE_K, PART_K)
        write(dv, sum_v, buffers.v.index(PART), text_len, problem, PART, D, BLOCK_K, TILE_K, PART_K)
    tma.store_wait(0)


@gluon.jit
def allocated(DTYPE: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """The buffers of a program, their barriers ready."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    EXCHANGED: gl.constexpr = ROWS if BLOCK_K == ROWS else 8
    buffers = KeyBuffers(
        gl.allocate_shared_memory(DTYPE, [BLOCK_K // ROWS, ROWS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [BLOCK_K // ROWS, ROWS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], SHARED),
        gl.allocate_shared_memory(gl.float32, [2, EXCHANGED, D], WIDE),
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(buffers.keys_full.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(buffers.full.index(stage), count=1)
        mbarrier.init(buffers.empty.index(stage), count=BLOCK_K // ROWS)
    for part in gl.static_range(2):
        mbarrier.init(buffers.sums_full.index(part), count=1)
    fence_async_shared()
    return buffers


@gluon_kernel
def block_sparse_gluon_dkdv_kernel(
    statistics,
    q_tile, q_run, g_tile, g_run, k_tile, k_run, v_tile, v_run, dk_tile, dk_run, dv_tile, dv_run,
    visits, problem, distances, scale, key_tokens,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    PART_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv [B, Nk, H, D] of one key block of one head, over the query blocks that visit it.

    Args:
        statistics: as the dq kernel writes them.
        visits: `records.Visits`, whose numbers are read if bit 2 of `present` is set.
        distances: `copies.Distances` of q, g, k and v.
        PART_K: the tile of 64 keys that a copy brings, (0, 0, 0) for raster order.
    """
    text_len = program_segments(problem).text_len
    block, i_h = program_key_block(problem)
    i_b = gl.program_id(2)  # with `program_sample` a loop spills at 128 x 128
    head = over_samples(i_b, i_h, problem)
    firsts = visits.firsts + head * visits.per_head * (2 * problem.width + 1) + 2 * block
    first, clean, last = gl.load(firsts), gl.load(firsts + 1), gl.load(firsts + 2)
    listed = KeyVisits(visits.entries, visits.places, visits.numbers, first, clean, last)
    q = head_read((q_tile, q_run), distances[0], i_b, i_h)
    g = head_read((g_tile, g_run), distances[1], i_b, i_h)
    k = head_read((k_tile, k_run), distances[2], i_b, i_h)
    v = head_read((v_tile, v_run), distances[3], i_b, i_h)
    dk = head_written((dk_tile, dk_run), key_tokens, i_b, i_h, D)
    dv = head_written((dv_tile, dv_run), key_tokens, i_b, i_h, D)
    statistics += head.to(gl.int64) * (problem.queries.visual_blocks + problem.dense) * (4 * ROWS)
    buffers = allocated(q_run.dtype, D, BLOCK_K, STAGES)
    gl.warp_specialize(
        [
            (produce, (
                q, g, k, v, listed, text_len, problem, buffers,
                D, BLOCK_K, TILE_Q, HALF, TILE_K, PART_K, STAGES,
            )),
            (consume, (
                dk, dv, listed, statistics, scale, text_len, problem, buffers,
                0, D, BLOCK_K, TILE_K, PART_K, STAGES,
            )),
            (consume, (
                dk, dv, listed, statistics, scale, text_len, problem, buffers,
                1, D, BLOCK_K, TILE_K, PART_K, STAGES,
            )),
        ],
        [4, 4],
        [232, 232],
    )  # fmt: skip
