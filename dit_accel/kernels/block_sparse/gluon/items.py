"""The shared memory of a Gluon forward program, and how its partitions go from one item to the next.

A program takes items in turn, see `Queue`. The producer brings the next item's queries and keys while consumers finish
the last one. Steps and buffers are numbered through all items, so that phases of barriers run on.

Shared memory has no room for the output. It lies where an item's last keys lay, and that buffer is free again
when the output has been read, which the next item's first step finds out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from dit_accel.kernels.block_sparse.gluon.copies import KEYS, ROWS, put


class Buffers(NamedTuple):
    """Shared memory: tiles, and for each a barrier that says it is full and one that says it is free.

    `words` go with the keys: of each half of a step, which slots of a block hold a token; see `put_words`. So do
    `biases` with pseudo-keys, one for each; `words` without a tail.
    """

    q: Any
    k: Any
    v: Any
    words: Any
    biases: Any
    numbers: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class Queue(NamedTuple):
    """The items of a launch, which programs take in turn: a number each, then the next of a counter.

    Attributes:
        counter: int32 [1], 0 at the launch.
        items, heads: of all samples.
    """

    counter: Any
    items: Any
    heads: Any


@gluon.jit
def allocated(
    DTYPE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TENSORS: gl.constexpr = 1, TAIL: gl.constexpr = False
):  # fmt: skip
    """The buffers of a program, their barriers ready; TENSORS of queries, each of both consumers."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], LINE)
    biases = words
    if TAIL:
        biases = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], LINE)
    buffers = Buffers(
        gl.allocate_shared_memory(DTYPE, [2 * TENSORS, ROWS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], SHARED),
        gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], SHARED),
        words,
        biases,
        gl.allocate_shared_memory(gl.int32, [2, 1], LINE),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for part in gl.static_range(2):
        mbarrier.init(buffers.q_full.index(part), count=1)
    mbarrier.init(buffers.q_empty.index(0), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(buffers.k_full.index(stage), count=2)
        mbarrier.init(buffers.v_full.index(stage), count=1)
        mbarrier.init(buffers.k_empty.index(stage), count=2)
        mbarrier.init(buffers.v_empty.index(stage), count=2)
    fence_async_shared()
    return buffers


@gluon.jit
def announce(number, turn, buffers):
    """Tell consumers the number of the turn's item, when they have multiplied the last queries."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(buffers.q_empty.index(0), (turn & 1) ^ 1)
    buffers.numbers.index(turn & 1).store(gl.full([1], number, gl.int32, ONE))


@gluon.jit
def announce_end(number, turn, buffers):
    """The number that is no item's ends the consumers."""
    announce(number, turn, buffers)
    for part in gl.static_range(2):
        mbarrier.arrive(buffers.q_full.index(part), count=1)


@gluon.jit
def announced(turn, buffers, PART: gl.constexpr):
    """The number of the turn's item; its queries have arrived."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(buffers.q_full.index(PART), turn & 1)
    return gl.max(buffers.numbers.index(turn & 1).load(ONE), 0)


@gluon.jit
def next_item(queue):
    """The number of the item that this program takes next."""
    return gl.atomic_add(queue.counter, 1) + gl.num_programs(0)


@gluon.jit
def give_no_values(i, buffers, STAGES: gl.constexpr):
    """A step without values."""
    mbarrier.wait(buffers.v_empty.index(i % STAGES), (i // STAGES & 1) ^ 1)
    mbarrier.arrive(buffers.v_full.index(i % STAGES), count=1)


@gluon.jit
def take_no_values(i, buffers, STAGES: gl.constexpr):
    """A step without values."""
    mbarrier.wait(buffers.v_full.index(i % STAGES), i // STAGES & 1)
    mbarrier.arrive(buffers.v_empty.index(i % STAGES), count=1)


@gluon.jit
def free_output(first, buffers, STAGES: gl.constexpr):
    """The buffer of keys before step `first` held the output of the item before; it has been stored."""
    if first > 0:
        tma.store_wait(0)
        mbarrier.arrive(buffers.k_empty.index((first - 1) % STAGES), count=1)


@gluon.jit
def put_output(
    acc, out, where, first, turn, buffers,
    PART: gl.constexpr, D: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copy of a consumer's output, from the buffer of keys before step `first`, see `free_output`."""
    buffer = buffers.k.index((first - 1) % STAGES)
    mbarrier.wait(buffers.q_empty.index(0), turn & 1)  # the other consumer has multiplied what is there
    buffer.slice(PART * ROWS, ROWS, 0).store(acc.to(buffer.dtype))
    fence_async_shared()
    put(out, where, buffer, PART, 2, HALF, D)
