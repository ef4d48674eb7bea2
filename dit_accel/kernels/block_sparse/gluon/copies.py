"""What a program of the Gluon kernel works on, and its copies: `forward` describes the descriptors."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from dit_accel.kernels.block_sparse.triton_tokens import list_of, starts_of

# Triton 3.9 has new names for the copies
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a consumer: what one matrix instruction of a warpgroup takes
KEYS = gl.constexpr(128)  # of a step: one block, or two of 64
RUN = gl.constexpr(1 << 30)  # rows of a run's third axis


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

    places: Any
    spans: Any
    words: Any
    visual_starts: Any
    conditioning_starts: Any
    text_starts: Any
    text_lens: Any
    usual: Any
    given: Any
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

    places: Any
    pure: Any
    clean: Any
    tabled: Any
    count: Any
    number: Any
    starts: Any
    text_len: Any


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
def own_starts(call):
    """Where this program's sample's keys begin, and where its text ends."""
    return starts_of(
        gl.program_id(2), call.visual_starts, call.conditioning_starts, call.text_starts, call.text_lens, call.usual,
        call.given,
    )  # fmt: skip


@gluon.jit
def query_starts(call):
    """Where this program's sample's queries begin."""
    starts, _text_len = own_starts(call)
    visual_start, conditioning_start, text_start = starts
    return visual_start * call.shared_rows, conditioning_start, text_start


@gluon.jit
def own_query(call, TILE_Q: gl.constexpr):
    """Where this program's query block lies."""
    starts = query_starts(call)
    # text rows, which see everything, are the last blocks: start them first
    block = call.query_blocks - 1 - gl.program_id(0)
    return whereabouts(block, starts, call.query_text, call.queries, 2 * ROWS, TILE_Q)


@gluon.jit
def own_list(call):
    """This program's list."""
    starts, text_len = own_starts(call)
    row = (gl.program_id(2) * call.heads + gl.program_id(1)) * call.per_head * call.query_blocks
    row += call.query_blocks - 1 - gl.program_id(0)
    places, pure, clean, tabled, count, number = list_of(row, call.places, call.spans, call.width)
    return Walk(places, pure, clean, tabled, count, number, starts, text_len)


@gluon.jit
def steps_of(walk, BLOCK_K: gl.constexpr):
    """Steps of KEYS slots that a list has."""
    return gl.cdiv(walk.count, KEYS // BLOCK_K)


@gluon.jit
def entry(i, PART: gl.constexpr, walk, BLOCK_K: gl.constexpr):
    """The list entry that is the PART-th block of a step; beyond the list its last, which is masked."""
    return gl.maximum(gl.minimum(i * (KEYS // BLOCK_K) + PART, walk.count - 1), 0)


@gluon.jit
def place_at(i, PART: gl.constexpr, walk, BLOCK_K: gl.constexpr):
    """Where the PART-th block of a step lies, see `triton_lists.OrderedLists.places`."""
    return gl.load(walk.places + entry(i, PART, walk, BLOCK_K))


@gluon.jit
def fetch_listed(
    x, i, place, walk, call, bar, buffer,
    PART: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Start the copy of the PART-th block of a step. A block without padding slots costs no division."""
    PARTS: gl.constexpr = KEYS // BLOCK_K
    if entry(i, PART, walk, BLOCK_K) < walk.tabled:
        first = x.offset + walk.starts[0]
        visual = call.keys.visual
        if TILE_K[1] == 0:
            as_run = part_of_buffer(buffer.reshape([PARTS, 1, BLOCK_K, D]), PART, PARTS)
            copy_in(x.run, (RUN, first + visual, RUN - visual + place, x.column), bar, as_run)
        else:
            t, h, w = place * 0, place * 0, place * 0
            if entry(i, PART, walk, BLOCK_K) >= walk.clean:
                line = place // call.keys.W
                t, h, w = line // call.keys.H, line % call.keys.H, place % call.keys.W
                place = place * 0
            as_tile = buffer.reshape([PARTS, TILE_K[0], TILE_K[1], TILE_K[2], D])
            copy_in(x.tile, (first + place, t, h, w, x.column), bar, part_of_buffer(as_tile, PART, PARTS))
    else:
        where = whereabouts(place, walk.starts, walk.text_len, call.keys, BLOCK_K, TILE_K)
        fetch(x, where, bar, buffer, PART, PARTS, BLOCK_K, TILE_K, D)
