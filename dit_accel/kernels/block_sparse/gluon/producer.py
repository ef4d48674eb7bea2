"""The producer of the Gluon forward kernels: what it copies of an item, see `forward`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_accel.kernels.block_sparse.gluon.copies import (
    KEYS,
    ROWS,
    corner_at,
    end_of,
    fetch,
    fetch_listed,
    head_read,
    item_at,
    list_of,
    part_of,
    place_at,
    program_number,
    query_of,
)
from dit_accel.kernels.block_sparse.gluon.items import announce, announce_end, next_item
from dit_accel.kernels.block_sparse.triton_tokens import occupied


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
    k, v, walk, problem, buffers, D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr
):
    """Keys and values of the listed blocks, in order."""
    end = end_of(walk, BLOCK_K)
    near, far = end, end
    if end > walk.first:
        near = place_at(walk.first, 0, walk, BLOCK_K)
        far = place_at(walk.first, KEYS // BLOCK_K - 1, walk, BLOCK_K)
    for i in range(walk.first, end):
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
def produce_item(
    number, item, turn, first, read, problem, buffers,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """An item's number, the queries of both consumers, then `produce_keys`. Returns the number of the next step."""
    walk = list_of(item, first, problem, BLOCK_K)
    q = head_read(read[0], read[3][0], item.sample, item.head)
    where_q = query_of(item, problem, TILE_Q)
    announce(number, turn, buffers)
    for part in gl.static_range(2):
        where = part_of(where_q, part, TILE_Q)
        mbarrier.expect(buffers.q_full.index(part), ROWS * D * 2)
        fetch(q, where, buffers.q_full.index(part), buffers.q.index(part), 0, 1, ROWS, HALF, D)
    k = head_read(read[1], read[3][1], item.sample, item.head)
    v = head_read(read[2], read[3][2], item.sample, item.head)
    produce_keys(k, v, walk, problem, buffers, D, BLOCK_K, TILE_K, STAGES)
    return end_of(walk, BLOCK_K)


@gluon.jit
def produce_items(
    read, behind, problem, queue, buffers, PRODUCE_BEHIND: gl.constexpr,
    D: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, HALF: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: of each item `produce_item`, then the steps that PRODUCE_BEHIND makes from `behind`.

    PRODUCE_BEHIND takes the number of the item's first step and of the next one, and returns that of the next item's.
    """
    number = program_number()
    turn = number * 0
    first = number * 0
    while number < queue.items:
        item = item_at(number, queue.heads, problem)
        end = produce_item(
            number, item, turn, first, read, problem, buffers, D, BLOCK_K, TILE_Q, HALF, TILE_K, STAGES
        )  # fmt: skip
        first = PRODUCE_BEHIND(item, first, end, behind, problem, buffers, D, STAGES)
        turn += 1
        number = next_item(queue)
    announce_end(number, turn, buffers)
