"""The forward kernel of the Gluon implementation, for compute capability 9.0: a producer warp and two consumers.

A program is one query block of 128 rows of one head. The producer warp (40 registers a thread) walks the block's list
and has the copy engine bring key and value tiles into shared memory. Two consumer warpgroups (240 registers a thread)
attend to the tiles, each for 64 of the rows. Barriers say which buffer is full and which is free.

The copy engine reads and writes rows through two kinds of descriptors of a tensor, which `gluon` makes:

* a *tile* [1, t, h, w, D] lies at a frame, row and column of the grid. Slots beyond the grid are read as zeros and are
  not written. Its first axis counts rows of memory: it carries where a sample, a head and its visual tokens begin.
* a *run* [1, 1, rows, D] lies within a segment. Its first two axes wrap addresses around 2 ** 64, which bounds rows by
  the segment's end although that differs from sample to sample (the arithmetic is that of `triton.tools.ragged_tma`).

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

from dit_accel.kernels.block_sparse.triton_tokens import list_of, starts_of

# Triton 3.9 has new names for the copies
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a consumer: what one matrix instruction of a warpgroup takes
RUN = gl.constexpr(1 << 30)  # rows of a run's third axis
LOG2E = gl.constexpr(1.4426950408889634)


class Side(NamedTuple):
    """Queries or keys: the grid, its tiles down and across, its tokens and blocks, and the conditioning tokens."""

    T: Any
    H: Any
    W: Any
    tiles_h: Any
    tiles_w: Any
    visual: Any
    visual_blocks: Any
    conditioning: Any
    conditioning_blocks: Any


class Where(NamedTuple):
    """Where slots lie: at a corner of the grid, and as a run in a segment of `size` tokens whose first row is given."""

    is_visual: Any
    t: Any
    h: Any
    w: Any
    first: Any
    size: Any
    place: Any


class Addressed(NamedTuple):
    """One head of a tensor: its descriptors, and its offset in rows and in columns."""

    tile: Any
    run: Any
    offset: Any
    column: Any


class Launched(NamedTuple):
    """What all programs are given, beside tensors."""

    entries: Any
    spans: Any
    words: Any
    visual_starts: Any
    conditioning_starts: Any
    text_starts: Any
    text_lens: Any
    queries: Any  # Side
    keys: Any  # Side
    query_text: Any
    heads: Any
    query_blocks: Any
    width: Any
    per_head: Any
    shared_rows: Any


class Walk(NamedTuple):
    """A program's list (`triton_lists.OrderedLists`), and where its sample's keys begin and its text ends."""

    entries: Any
    pure: Any
    tabled: Any
    count: Any
    number: Any
    starts: Any
    text_len: Any


class Buffers(NamedTuple):
    """Shared memory: tiles, and for each a barrier that says it is full and one that says it is free."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


@gluon.jit
def whereabouts(block, starts, text, side, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Where a block lies."""
    visual_start, conditioning_start, text_start = starts
    t, h, w = block, block, block
    if TILE[1] > 0:
        row = block // side.tiles_w
        t, h, w = row // side.tiles_h * TILE[0], row % side.tiles_h * TILE[1], block % side.tiles_w * TILE[2]
    behind = block - side.visual_blocks
    is_visual = behind < 0
    is_text = behind >= side.conditioning_blocks
    first = gl.where(is_visual, visual_start, gl.where(is_text, text_start, conditioning_start))
    size = gl.where(is_visual, side.visual, gl.where(is_text, text, side.conditioning))
    place = gl.where(is_visual, block, gl.where(is_text, behind - side.conditioning_blocks, behind)) * BLOCK
    return Where(is_visual, t, h, w, first, size, place)


@gluon.jit
def part_of(where, PART: gl.constexpr, TILE: gl.constexpr):
    """Where the rows of a consumer lie: the PART-th half, in the order of slots, of a query block."""
    t, h, w = where.t, where.h, where.w
    if TILE[0] > 1:
        t += PART * (TILE[0] // 2)
    elif TILE[1] > 1:
        h += PART * (TILE[1] // 2)
    else:
        w += PART * (TILE[2] // 2)
    return Where(where.is_visual, t, h, w, where.first, where.size, where.place + PART * ROWS)


@gluon.jit
def fetch(x, where, bar, buffer, SLOTS: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr):
    """Start the copy of SLOTS rows of one head into a buffer [SLOTS, D]; `bar` completes when they have come."""
    first = x.offset + where.first
    run = (RUN, first + where.size, RUN - where.size + where.place, x.column)
    mbarrier.expect(bar, SLOTS * D * 2)
    if TILE[1] == 0:
        copy_in(x.run, run, bar, buffer.reshape([1, 1, SLOTS, D]))
    elif where.is_visual:
        tile = (first, where.t, where.h, where.w, x.column)
        copy_in(x.tile, tile, bar, buffer.reshape([1, TILE[0], TILE[1], TILE[2], D]))
    else:
        copy_in(x.run, run, bar, buffer.reshape([1, 1, SLOTS, D]))


@gluon.jit
def put(x, where, buffer, TILE: gl.constexpr, D: gl.constexpr):
    """Start the copy of a consumer's buffer [ROWS, D] to its rows in memory."""
    first = x.offset + where.first
    run = (RUN, first + where.size, RUN - where.size + where.place, x.column)
    if TILE[1] == 0:
        copy_out(x.run, run, buffer.reshape([1, 1, ROWS, D]))
    elif where.is_visual:
        tile = (first, where.t, where.h, where.w, x.column)
        copy_out(x.tile, tile, buffer.reshape([1, TILE[0], TILE[1], TILE[2], D]))
    else:
        copy_out(x.run, run, buffer.reshape([1, 1, ROWS, D]))


@gluon.jit
def own_query(call, TILE_Q: gl.constexpr):
    """Where this program's query block lies."""
    starts, _text_len = starts_of(
        gl.program_id(2), call.visual_starts, call.conditioning_starts, call.text_starts, call.text_lens
    )
    visual_start, conditioning_start, text_start = starts
    starts = (visual_start * call.shared_rows, conditioning_start, text_start)
    # text rows, which see everything, are the last blocks: start them first
    block = call.query_blocks - 1 - gl.program_id(0)
    return whereabouts(block, starts, call.query_text, call.queries, 2 * ROWS, TILE_Q)


@gluon.jit
def own_list(call):
    """This program's list."""
    starts, text_len = starts_of(
        gl.program_id(2), call.visual_starts, call.conditioning_starts, call.text_starts, call.text_lens
    )
    row = (gl.program_id(2) * call.heads + gl.program_id(1)) * call.per_head * call.query_blocks
    row += call.query_blocks - 1 - gl.program_id(0)
    entries, pure, _clean, tabled, count, number = list_of(row, call.entries, call.spans, call.width)
    return Walk(entries, pure, tabled, count, number, starts, text_len)


@gluon.jit
def produce(
    q, k, v, call, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: queries of both consumers, then keys and values of the listed blocks, in order."""
    where_q = own_query(call, TILE_Q)
    for part in gl.static_range(2):
        where = part_of(where_q, part, TILE_Q)
        fetch(q, where, buffers.q_full.index(part), buffers.q.index(part), ROWS, HALF, D)
    walk = own_list(call)
    for i in range(walk.count):
        stage = i % STAGES
        phase = i // STAGES & 1
        where = whereabouts(gl.load(walk.entries + i), walk.starts, walk.text_len, call.keys, BLOCK_K, TILE_K)
        mbarrier.wait(buffers.k_empty.index(stage), phase ^ 1)
        fetch(k, where, buffers.k_full.index(stage), buffers.k.index(stage), BLOCK_K, TILE_K, D)
        mbarrier.wait(buffers.v_empty.index(stage), phase ^ 1)
        fetch(v, where, buffers.v_full.index(stage), buffers.v.index(stage), BLOCK_K, TILE_K, D)


@gluon.constexpr_function
def repeated(distance):
    """A word, as a signed number, with a bit at each multiple of `distance` slots, a power of two."""
    word = sum(1 << slot for slot in range(0, 64, distance))
    return word - (word >> 63 << 64)


@gluon.jit
def below(count):
    """The slots 0, ..., count - 1 as a word, for any count: int64."""
    count = gl.minimum(gl.maximum(count, 0), 64)
    one = count.to(gl.int64) * 0 + 1
    return gl.where(count > 63, -one, (one << gl.minimum(count, 63)) - one)


@gluon.jit
def held(where, side, FIRST: gl.constexpr, TILE: gl.constexpr):
    """Which of the slots FIRST, ..., FIRST + 63 of a block hold a token, as a word: int64."""
    word = below(where.size - where.place - FIRST)
    if TILE[1] > 0:
        LINE: gl.constexpr = TILE[2]
        FRAME: gl.constexpr = TILE[1] * TILE[2]
        columns = below(gl.minimum(side.W - where.w, LINE) - FIRST % LINE) * repeated(LINE)
        rows = below(gl.minimum(side.H - where.h, TILE[1]) * LINE - FIRST % FRAME) * repeated(FRAME)
        word = gl.where(where.is_visual, below((side.T - where.t) * FRAME - FIRST) & rows & columns, word)
    return word


@gluon.jit
def masked(
    scores, i, walk, call,
    PART: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores [ROWS, BLOCK_K] of the list's i-th block, -inf where a pair is not allowed or a slot holds no token.

    Partial blocks have the words of `triton_predicate`, one for 64 slots of a row; others a word for all rows.
    """
    if i >= walk.pure:
        rows = ROWS * PART + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        slots = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))[None, :]
        if i < walk.tabled:
            number = (walk.number + i - walk.pure).to(gl.int64)
            p_words = call.words + number * (BLOCK_K // 64 * (2 * ROWS)) + rows
            low = gl.load(p_words)
            high = low
            if BLOCK_K > 64:
                high = gl.load(p_words + 2 * ROWS)
        else:
            where = whereabouts(gl.load(walk.entries + i), walk.starts, walk.text_len, call.keys, BLOCK_K, TILE_K)
            none = gl.zeros([ROWS], gl.int64, gl.SliceLayout(1, LAYOUT))
            low = none + held(where, call.keys, 0, TILE_K)
            high = low
            if BLOCK_K > 64:
                high = none + held(where, call.keys, 64, TILE_K)
        word = gl.where(slots < 64, low[:, None], high[:, None])
        half = gl.where(slots % 64 < 32, word.to(gl.int32), (word >> 32).to(gl.int32))
        # the shift depends on the thread alone, the bit tested on the register alone
        seen = ((half >> (slots % 8)) & (1 << (slots % 32 // 8 * 8))) != 0
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def weigh(scores, peak, total, scale):
    """A step of the online softmax in base 2: weights, new peak and total, and what earlier sums shrink by."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    # a row that has seen no key yet has peak -inf; any finite number keeps its weights at exp2(-inf) = 0
    safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = gl.exp2(peak - safe)
    weights = gl.exp2(scores * scale - safe[:, None])
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


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
def consume(
    out, lse, scale, call, buffers,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 query rows over the whole list, then their output and LSE.

    A block's scores are multiplied while the block before is still being summed.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    walk = own_list(call)
    q = buffers.q.index(PART)
    acc = gl.zeros([ROWS, D], gl.float32, A)
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    mbarrier.wait(buffers.q_full.index(PART), 0)
    if walk.count > 0:
        mbarrier.wait(buffers.k_full.index(0), 0)
        scores = warpgroup_mma(q, buffers.k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(buffers.k_empty.index(0), count=1)
        scores = masked(scores, 0, walk, call, PART, BLOCK_K, TILE_K, S)
        weights, peak, total, shrink = weigh(scores, peak, total, scale)
        operand = gl.convert_layout(weights.to(q.dtype), P)
        mbarrier.wait(buffers.k_full.index(1 % STAGES), 1 // STAGES & 1, pred=walk.count > 1)
        for i in range(1, walk.count):
            stage = i % STAGES
            before = (i - 1) % STAGES
            after = (i + 1) % STAGES
            scores = warpgroup_mma(q, buffers.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(buffers.v_full.index(before), (i - 1) // STAGES & 1)
            summed = warpgroup_mma(operand, buffers.v.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(buffers.k_empty.index(stage), count=1)
            scores = masked(scores, i, walk, call, PART, BLOCK_K, TILE_K, S)
            weights, peak, total, shrink = weigh(scores, peak, total, scale)
            # The branch in this wait keeps the assembler from moving the weights behind the wait for the sum
            mbarrier.wait(buffers.k_full.index(after), (i + 1) // STAGES & 1, pred=i + 1 < walk.count)
            acc, weights, total = warpgroup_mma_wait(0, deps=(summed, weights, total))
            mbarrier.arrive(buffers.v_empty.index(before), count=1)
            operand = gl.convert_layout(weights.to(q.dtype), P)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
        last = (walk.count - 1) % STAGES
        mbarrier.wait(buffers.v_full.index(last), (walk.count - 1) // STAGES & 1)
        summed = warpgroup_mma(operand, buffers.v.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(summed,))
    empty = total == 0.0
    safe = gl.where(empty, 1.0, total)
    acc = acc / gl.convert_layout(safe, gl.SliceLayout(1, A))[:, None]
    where = part_of(own_query(call, TILE_Q), PART, TILE_Q)
    rows, valid = rows_of_part(where, call.queries, HALF, S)
    gl.store(lse + rows, gl.where(empty, float("-inf"), (peak + gl.log2(safe)) / LOG2E), mask=valid)
    q.store(acc.to(q.dtype))
    fence_async_shared()
    put(out, where, q, HALF, D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "q_batch", "q_head", "q_column", "k_batch", "k_head", "k_column", "v_batch", "v_head", "v_column",
    "T", "H", "W", "tiles_h", "tiles_w", "visual", "visual_blocks", "conditioning", "conditioning_blocks",
    "QT", "QH", "QW", "query_tiles_h", "query_tiles_w", "query_visual", "query_visual_blocks",
    "query_conditioning", "query_conditioning_blocks",
    "query_text", "heads", "query_tokens", "query_blocks", "width", "per_head", "shared_rows",
])  # fmt: skip
def block_sparse_gluon_fwd_kernel(
    q_tile, q_run, k_tile, k_run, v_tile, v_run, out_tile, out_run, lse,
    entries, spans, words,
    visual_starts, conditioning_starts, text_starts, text_lens,
    q_batch, q_head, q_column, k_batch, k_head, k_column, v_batch, v_head, v_column,
    scale,
    T, H, W, tiles_h, tiles_w, visual, visual_blocks, conditioning, conditioning_blocks,
    QT, QH, QW, query_tiles_h, query_tiles_w, query_visual, query_visual_blocks,
    query_conditioning, query_conditioning_blocks,
    query_text, heads, query_tokens, query_blocks, width, per_head, shared_rows,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Output [B, Nq, H, D] and LSE [B, H, Nq] of one query block of one head.

    Args:
        q_batch, q_head, q_column, ...: a tensor's distance from sample to sample in rows, and from head to head in
            rows and in columns, one of which is 0.
        scale: of the logits, above 0, in base 2.
        shared_rows: 1 if queries and keys are the same tokens, 0 if the queries are a grid of their own.
        TILE_Q, TILE_K: tiles of query and key blocks, (0, 0, 0) for raster order; HALF is a consumer's part of TILE_Q.
    """
    i_h = gl.program_id(1)
    i_b = gl.program_id(2)
    keys = Side(T, H, W, tiles_h, tiles_w, visual, visual_blocks, conditioning, conditioning_blocks)
    queries = Side(
        QT, QH, QW, query_tiles_h, query_tiles_w, query_visual, query_visual_blocks, query_conditioning,
        query_conditioning_blocks,
    )  # fmt: skip
    call = Launched(
        entries, spans, words, visual_starts, conditioning_starts, text_starts, text_lens, queries, keys,
        query_text, heads, query_blocks, width, per_head, shared_rows,
    )  # fmt: skip
    q = Addressed(q_tile, q_run, i_b * q_batch + i_h * q_head, i_h * q_column)
    k = Addressed(k_tile, k_run, i_b * k_batch + i_h * k_head, i_h * k_column)
    v = Addressed(v_tile, v_run, i_b * v_batch + i_h * v_head, i_h * v_column)
    out = Addressed(out_tile, out_run, i_b * query_tokens, i_h * D)
    lse += (i_b * heads + i_h).to(gl.int64) * query_tokens
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    buffers = Buffers(
        gl.allocate_shared_memory(q_run.dtype, [2, ROWS, D], SHARED),
        gl.allocate_shared_memory(q_run.dtype, [STAGES, BLOCK_K, D], SHARED),
        gl.allocate_shared_memory(q_run.dtype, [STAGES, BLOCK_K, D], SHARED),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for part in gl.static_range(2):
        mbarrier.init(buffers.q_full.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(buffers.k_full.index(stage), count=1)
        mbarrier.init(buffers.v_full.index(stage), count=1)
        mbarrier.init(buffers.k_empty.index(stage), count=2)
        mbarrier.init(buffers.v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (out, lse, scale, call, buffers, 0, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (consume, (out, lse, scale, call, buffers, 1, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
            (produce, (q, k, v, call, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )
