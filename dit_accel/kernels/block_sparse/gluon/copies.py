"""What a program of the Gluon kernel works on, and its copies: `forward` describes the descriptors."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from dit_accel.kernels.block_sparse.triton_tokens import block_and_head, key_list, query_segments, segments_of
from dit_accel.kernels.records import Corner, KeyList, Lists, SampleSegments
from dit_accel.order import TokenOrder

# Triton 3.9 has new names for the copies
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a consumer: what one matrix instruction of a warpgroup takes
KEYS = gl.constexpr(128)  # of a step: one block, or two of 64
RUN = gl.constexpr(1 << 30)  # rows of a run's third axis
PROGRAM_NUMBER = gl.constexpr(
    "{ .reg .u32 x, y, n; mov.u32 x, %ctaid.x; mov.u32 y, %ctaid.y; mov.u32 n, %nctaid.x; mad.lo.u32 $0, y, n, x; }"
)


class TiledSide(NamedTuple):
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

    @classmethod
    def of(cls, order: TokenOrder) -> TiledSide:
        grid = order.grid
        return cls(
            *grid.shape, *order.tiles[1:], grid.visual, order.visual_blocks, grid.conditioning,
            order.conditioning_blocks,
        )  # fmt: skip


class Distances(NamedTuple):
    """Of a tensor: rows from sample to sample, and rows and columns from head to head, one of which is 0."""

    batch: Any
    head: Any
    column: Any


class Addressed(NamedTuple):
    """One head of a tensor: its descriptors, and its offset in rows and in columns."""

    tile: Any
    run: Any
    offset: Any
    column: Any


class GluonProblem(NamedTuple):
    """What all programs of a kernel read, beside tensors: the members of `records.Lists` and `records.SampleSegments`.

    Consumers capture it whole, so it has no spare member, and their order decides whether the forward spills.

    Attributes:
        dense: query blocks behind the visual ones.
        list_rows: lists from one head to the next, 0 where all heads share them.
        spans, width: for dk and dv `triton_lists.Transposed.firsts` and the number of key blocks.
        present: bit 2 says that an optional tensor of the kernel is read or written.
        queries, keys: a `TiledSide` each.
    """

    places: Any
    spans: Any
    words: Any
    tensors: Any
    usual: Any
    present: Any
    queries: Any
    keys: Any
    query_text: Any
    heads: Any
    dense: Any
    width: Any
    list_rows: Any
    shared_rows: Any

    @classmethod
    def of(
        cls,
        lists: Lists,
        samples: SampleSegments,
        queries: TiledSide,
        keys: TiledSide,
        query_order: TokenOrder,
        heads: int,
    ) -> GluonProblem:
        places, spans, words, width, per_head = lists
        tensors, usual, present, shared_rows = samples
        return cls(
            places, spans, words, tensors, usual, present, queries, keys, query_order.grid.text, heads,
            query_order.dense_blocks, width, per_head * query_order.blocks, shared_rows,
        )  # fmt: skip


class Item(NamedTuple):
    """A piece of work: a query block of one head of a sample."""

    block: Any
    head: Any
    sample: Any


class Walk(NamedTuple):
    """An item's list (`records.KeyList`), and where its sample's keys begin and its text ends (`SegmentRows`).

    A program numbers its steps through all its items: this one's begin at `first`, and the list is moved there.
    """

    listed: Any
    segments: Any
    first: Any


@gluon.jit
def program_number():
    """This program's number. The assembler sees a new number in each call, as in `program_sample`.

    Otherwise it divides before the warps part, and holds what follows from the number in registers of all of them.
    """
    return gl.inline_asm_elementwise(PROGRAM_NUMBER, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def program_sample():
    """This program's sample."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.z;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def program_item(problem):
    """The item of a program that has one."""
    block, head = block_and_head(program_number(), problem.heads, problem.queries.visual_blocks, problem.dense)
    return Item(block, head, program_sample())


@gluon.jit
def item_at(number, all_heads, problem):
    """The item of a number, counted over all heads of all samples."""
    block, head = block_and_head(number, all_heads, problem.queries.visual_blocks, problem.dense)
    sample = head // problem.heads
    return Item(block, head - sample * problem.heads, sample)


@gluon.jit
def program_key_block(problem):
    """The same for the kernel of dk and dv."""
    visual = problem.keys.visual_blocks
    return block_and_head(program_number(), problem.heads, visual, problem.width - visual)


@gluon.jit
def head_read(descriptors, distances, sample, i_h):
    """One head of a sample, of a tensor that is read."""
    offset = sample * distances.batch + i_h * distances.head
    return Addressed(descriptors[0], descriptors[1], offset, i_h * distances.column)


@gluon.jit
def head_written(descriptors, tokens, sample, i_h, D: gl.constexpr):
    """One head of a sample, of a result [B, N, H, D]; `tokens` is N."""
    return Addressed(descriptors[0], descriptors[1], sample * tokens, i_h * D)


@gluon.jit
def over_samples(sample, i_h, problem):
    """A head of a sample, counted over all samples."""
    return sample * problem.heads + i_h


@gluon.jit
def corner_at(block, segments, side, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Where a block lies, a `records.Corner`. `triton_tokens.corner_of` divides more, and counts tiles from a row."""
    t, h, w = block, block, block
    if TILE[1] > 0:
        row = block // side.tiles_w
        t, h, w = row // side.tiles_h * TILE[0], row % side.tiles_h * TILE[1], block % side.tiles_w * TILE[2]
    behind = block - side.visual_blocks
    is_visual = behind < 0
    is_text = behind >= side.conditioning_blocks
    start = gl.where(is_text, segments.text_start, segments.conditioning_start)
    first = gl.where(is_visual, segments.visual_start, start)
    size = gl.where(is_visual, side.visual, gl.where(is_text, segments.text_len, side.conditioning))
    place = gl.where(is_visual, block, gl.where(is_text, behind - side.conditioning_blocks, behind)) * BLOCK
    return Corner(is_visual, t, h, w, first, size, place)


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
    return Corner(where.is_visual, t, h, w, where.first, where.size, where.place + PART * ROWS)


@gluon.jit
def fetch(
    x, where, bar, buffer, PART: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr, TILE: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Start the copy of SLOTS rows of one head into the PART-th of PARTS of a buffer; `bar` counts their bytes."""
    first = x.offset + where.first
    run = (RUN, first + where.size, RUN - where.size + where.place, x.column)
    as_run = buffer.reshape([PARTS, 1, SLOTS, D])
    if TILE[1] == 0:
        copy_in(x.run, run, bar, part_of_buffer(as_run, PART, PARTS))
    elif where.is_visual:
        as_tile = buffer.reshape([PARTS, TILE[0], TILE[1], TILE[2], D])
        copy_in(x.tile, (first, where.t, where.h, where.w, x.column), bar, part_of_buffer(as_tile, PART, PARTS))
    else:
        copy_in(x.run, run, bar, part_of_buffer(as_run, PART, PARTS))


@gluon.jit
def part_of_buffer(buffer, PART: gl.constexpr, PARTS: gl.constexpr):
    if PARTS > 1:
        buffer = buffer.slice(PART, 1, 0)
    return buffer


@gluon.jit
def put(x, where, buffer, PART: gl.constexpr, PARTS: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr):
    """Start the copy of the PART-th ROWS of a buffer [PARTS * ROWS, D] to their rows in memory."""
    first = x.offset + where.first
    run = (RUN, first + where.size, RUN - where.size + where.place, x.column)
    as_run = buffer.reshape([PARTS, 1, ROWS, D])
    if TILE[1] == 0:
        copy_out(x.run, run, part_of_buffer(as_run, PART, PARTS))
    elif where.is_visual:
        tile = (first, where.t, where.h, where.w, x.column)
        as_tile = buffer.reshape([PARTS, TILE[0], TILE[1], TILE[2], D])
        copy_out(x.tile, tile, part_of_buffer(as_tile, PART, PARTS))
    else:
        copy_out(x.run, run, part_of_buffer(as_run, PART, PARTS))


@gluon.jit
def program_segments(problem):
    """Where this program's sample's keys begin, and where its text ends."""
    return segments_of(program_sample(), problem)


@gluon.jit
def program_query_segments(problem):
    """The same for this program's sample's queries."""
    return query_segments(program_segments(problem), problem, problem.query_text)


@gluon.jit
def query_of(item, problem, TILE_Q: gl.constexpr):
    """Where an item's query block lies."""
    segments = query_segments(segments_of(item.sample, problem), problem, problem.query_text)
    return corner_at(item.block, segments, problem.queries, 2 * ROWS, TILE_Q)


@gluon.jit
def list_of(item, first, problem, BLOCK_K: gl.constexpr):
    """An item's list, whose first step has the number `first`."""
    row = over_samples(item.sample, item.head, problem) * problem.list_rows + item.block
    segments = segments_of(item.sample, problem)
    places, pure, clean, tabled, count, number = key_list(row, problem)
    moved = first * (KEYS // BLOCK_K)
    listed = KeyList(places - moved, pure + moved, clean + moved, tabled + moved, count + moved, number)
    return Walk(listed, segments, first)


@gluon.jit
def end_of(walk, BLOCK_K: gl.constexpr):
    """The number behind a list's last step, each of KEYS slots."""
    return gl.cdiv(walk.listed.count, KEYS // BLOCK_K)


@gluon.jit
def entry(i, PART: gl.constexpr, walk, BLOCK_K: gl.constexpr):
    """The list entry that is the PART-th block of a step; beyond the list, which is not empty, its last: masked."""
    return gl.minimum(i * (KEYS // BLOCK_K) + PART, walk.listed.count - 1)


@gluon.jit
def place_at(i, PART: gl.constexpr, walk, BLOCK_K: gl.constexpr):
    """Where the PART-th block of a step lies, see `triton_lists.OrderedLists.places`."""
    return gl.load(walk.listed.places + entry(i, PART, walk, BLOCK_K))


@gluon.jit
def fetch_listed(
    x, i, place, walk, problem, bar, buffer,
    PART: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Start the copy of the PART-th block of a step. A block without padding slots costs no division."""
    PARTS: gl.constexpr = KEYS // BLOCK_K
    if entry(i, PART, walk, BLOCK_K) < walk.listed.tabled:
        first = x.offset + walk.segments.visual_start
        visual = problem.keys.visual
        if TILE_K[1] == 0:
            as_run = part_of_buffer(buffer.reshape([PARTS, 1, BLOCK_K, D]), PART, PARTS)
            copy_in(x.run, (RUN, first + visual, RUN - visual + place, x.column), bar, as_run)
        else:
            t, h, w = place * 0, place * 0, place * 0
            if entry(i, PART, walk, BLOCK_K) >= walk.listed.clean:
                line = place // problem.keys.W
                t, h, w = line // problem.keys.H, line % problem.keys.H, place % problem.keys.W
                place = place * 0
            as_tile = buffer.reshape([PARTS, TILE_K[0], TILE_K[1], TILE_K[2], D])
            copy_in(x.tile, (first + place, t, h, w, x.column), bar, part_of_buffer(as_tile, PART, PARTS))
    else:
        where = corner_at(place, walk.segments, problem.keys, BLOCK_K, TILE_K)
        fetch(x, where, bar, buffer, PART, PARTS, BLOCK_K, TILE_K, D)
