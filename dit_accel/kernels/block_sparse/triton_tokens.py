"""What the Triton kernels read of a block: where its tokens lie, rows of one head, and bits of allowed pairs.

Nothing is permuted or padded in memory: the rows of a 3-D tile are arithmetic on its number. Blocks are numbered as in
`order.TokenOrder`; the tile of raster order is (0, 0, 0). Heads are counted over all samples.

A query's keys in one block are a set of slots, and a set of 64 slots is one 64-bit word. `partial_words_kernel` reads
the packed tables (`masks.Mask.pack`) once a call, for all heads. Forward and backward load the words and test one bit
a pair. Words are int64 [partial blocks, ceil(BLOCK_K / 64), BLOCK_Q], bit s of word w for slot 64 w + s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.records import Corner, HeadRows, KeyList, SegmentRows, Side

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def segments_of(i_b, samples):
    """Where one sample's segments begin, and its valid text tokens."""
    tensors, usual = samples.tensors, samples.usual
    placed = (samples.present & 1) != 0
    visual_start = tl.load(tensors.visual_start + i_b, mask=placed, other=usual.visual_start)
    conditioning_start = tl.load(tensors.conditioning_start + i_b, mask=placed, other=usual.conditioning_start)
    text_start = tl.load(tensors.text_start + i_b, mask=placed, other=usual.text_start)
    text_len = tl.load(tensors.text_len + i_b, mask=(samples.present & 2) != 0, other=usual.text_len)
    return SegmentRows(visual_start, conditioning_start, text_start, text_len)


@triton.jit
def query_segments(segments, samples, text):
    """The same for queries, whose `text` tokens are all valid."""
    visual_start = segments.visual_start * samples.shared_rows
    return SegmentRows(visual_start, segments.conditioning_start, segments.text_start, text)


@triton.jit
def key_list(row, lists):
    """One row of the lists."""
    p_span = lists.spans + row.to(tl.int64) * 5
    pure, clean, tabled, count = tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), tl.load(p_span + 3)
    places = lists.places + row.to(tl.int64) * lists.width
    return KeyList(places, pure, clean, tabled, count, tl.load(p_span + 4))


@triton.jit
def tile_position(block, slot, side, TILE: tl.constexpr):
    """Frame, row and column of slots of a tile: the tile's corner plus the slot's place in it."""
    tiles_h = tl.cdiv(side.H, TILE[1])
    tiles_w = tl.cdiv(side.W, TILE[2])
    t = block // (tiles_h * tiles_w) * TILE[0] + slot // (TILE[1] * TILE[2])
    h = block // tiles_w % tiles_h * TILE[1] + slot // TILE[2] % TILE[1]
    w = block % tiles_w * TILE[2] + slot % TILE[2]
    return t, h, w


@triton.jit
def places_in(slot, side, TILE: tl.constexpr):
    """Raster distance of slots of a visual block from its first slot; beyond the grid it is another token's."""
    if TILE[1] == 0:
        place = slot
    else:
        place = (slot // (TILE[1] * TILE[2]) * side.H + slot // TILE[2] % TILE[1]) * side.W + slot % TILE[2]
    return place


@triton.jit
def locate(block, slot, segments, side, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Row in memory, validity and raster index of slots of any block; the index is 0 outside the visual tokens."""
    visual = side.T * side.H * side.W
    if TILE[1] == 0:
        visual_blocks = tl.cdiv(visual, BLOCK)
        raster = block * BLOCK + slot
        inside = raster < visual
    else:
        visual_blocks = tl.cdiv(side.T, TILE[0]) * tl.cdiv(side.H, TILE[1]) * tl.cdiv(side.W, TILE[2])
        t, h, w = tile_position(block, slot, side, TILE)
        raster = (t * side.H + h) * side.W + w
        inside = (t < side.T) & (h < side.H) & (w < side.W)
    conditioning_blocks = tl.cdiv(side.conditioning, BLOCK)
    is_visual = block < visual_blocks
    is_conditioning = (block >= visual_blocks) & (block < visual_blocks + conditioning_blocks)
    # The block's segment: its first row, and the slot's place in it.
    behind = block - visual_blocks
    behind = tl.where(is_conditioning, behind, behind - conditioning_blocks)
    place = behind * BLOCK + slot
    limit = tl.where(is_conditioning, side.conditioning, segments.text_len)
    start = tl.where(is_conditioning, segments.conditioning_start, segments.text_start)
    row = tl.where(is_visual, segments.visual_start + raster, start + place)
    valid = tl.where(is_visual, inside, place < limit)
    raster = tl.where(is_visual & valid, raster, 0)
    return row, valid, raster


@triton.jit
def visual_only(side):
    """A side's grid, without other tokens."""
    return Side(side.T, side.H, side.W, 0, 0, 0, 0)


@triton.jit
def visual_slots(block, slot, side, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Row, validity and raster index of slots of a visual block, if the visual tokens begin at row 0."""
    return locate(block, slot, SegmentRows(0, 0, 0, 0), visual_only(side), BLOCK, TILE)


@triton.jit
def first_slots(count):
    """The slots 0, ..., count - 1 of a word, for any count: int64."""
    count = tl.minimum(tl.maximum(count, 0), 64)
    one = count.to(tl.int64) * 0 + 1
    return tl.where(count > 63, -one, (one << tl.minimum(count, 63)) - one)


@triton.constexpr_function
def every(distance):
    """A word, as a signed number, with a bit at each multiple of `distance` slots, a power of two."""
    word = sum(1 << slot for slot in range(0, 64, distance))
    return word - (word >> 63 << 64)


@triton.jit
def corner_of(block, segments, side, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Where any block lies, for `rows_at` and `occupied`: numbers alone, no slots."""
    visual = side.T * side.H * side.W
    if TILE[1] == 0:
        visual_blocks = tl.cdiv(visual, BLOCK)
        t, h, w = block, block, block
        corner = block * BLOCK
    else:
        tiles_h, tiles_w = tl.cdiv(side.H, TILE[1]), tl.cdiv(side.W, TILE[2])
        visual_blocks = tl.cdiv(side.T, TILE[0]) * tiles_h * tiles_w
        line = block // tiles_w
        t, h, w = line // tiles_h * TILE[0], line % tiles_h * TILE[1], block % tiles_w * TILE[2]
        corner = (t * side.H + h) * side.W + w
    behind = block - visual_blocks
    conditioning_blocks = tl.cdiv(side.conditioning, BLOCK)
    is_text = behind >= conditioning_blocks
    is_visual = behind < 0
    behind = tl.where(is_text, behind - conditioning_blocks, behind)
    start = tl.where(is_text, segments.text_start, segments.conditioning_start)
    first = tl.where(is_visual, segments.visual_start, start)
    size = tl.where(is_visual, visual, tl.where(is_text, segments.text_len, side.conditioning))
    return Corner(is_visual, t, h, w, first, size, tl.where(is_visual, corner, behind * BLOCK))


@triton.jit
def rows_at(corner, visual_start, slot, side, TILE: tl.constexpr):
    """A row in memory for every slot, some token's for padding slots: int64. It is not read past its segment.

    A segment without tokens has the first visual row.
    """
    if TILE[1] > 0:
        slot = tl.where(corner.is_visual, places_in(slot, side, TILE), slot)
    first = tl.where(corner.size > 0, corner.first, visual_start)
    return (first + tl.minimum(corner.place + slot, tl.maximum(corner.size, 1) - 1)).to(tl.int64)


@triton.jit
def occupied(corner, first, side, TILE: tl.constexpr):
    """Which of the 64 slots from `first` on hold a token, as a word: int64."""
    word = first_slots(corner.size - corner.place - first)
    if TILE[1] > 0:
        LINE: tl.constexpr = TILE[2]
        FRAME: tl.constexpr = TILE[1] * TILE[2]
        columns = first_slots(tl.minimum(side.W - corner.w, LINE) - first % LINE) * every(LINE)
        rows = first_slots(tl.minimum(side.H - corner.h, TILE[1]) * LINE - first % FRAME) * every(FRAME)
        frames = first_slots((side.T - corner.t) * FRAME - first)
        word = tl.where(corner.is_visual, frames & rows & columns, word)
    return word


@triton.jit
def program_number():
    """This program's number, counted over the first two axes of the grid: blocks and heads."""
    return tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)


@triton.jit
def block_and_head(number, heads, visual, dense):
    """The block and the head of a program by its number; each head has `visual` blocks, and then `dense` ones.

    Dense blocks have the longest lists. Those of all heads come first, so that no long program begins when most of the
    others have ended. The other blocks follow head by head, so that neighbours share a head's keys in the cache.
    """
    behind = number - dense * heads
    is_dense = behind < 0
    per_head = tl.where(is_dense, dense, visual)
    number = tl.where(is_dense, number, behind)
    head = number // per_head
    return number - head * per_head + tl.where(is_dense, visual, 0), head


@triton.jit
def program_block(blocks, side, BLOCK: tl.constexpr):
    """This program's block of one side, and its head, counted over all samples; each head has `blocks`."""
    dense = tl.cdiv(side.conditioning, BLOCK) + tl.cdiv(side.text, BLOCK)
    return block_and_head(program_number(), tl.num_programs(1), blocks - dense, dense)


@triton.jit
def program_queries(samples, queries, heads, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr):
    """This program's query block and head; the segments of its sample's keys and queries; rows and validity."""
    i_q, i_bh = program_block(queries.blocks, queries, BLOCK_Q)
    segments = segments_of(i_bh // heads, samples)
    starts = query_segments(segments, samples, queries.text)
    rows, valid, _raster = locate(i_q, tl.arange(0, BLOCK_Q), starts, queries, BLOCK_Q, TILE_Q)
    return i_q, i_bh, segments, starts, rows, valid


@triton.jit
def program_queries_again(starts, queries, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr):
    """The head, rows and validity of `program_queries`, recomputed from the grid: otherwise the rows spill."""
    i_q, i_bh = program_block(tl.num_programs(0), queries, BLOCK_Q)
    rows, valid, _raster = locate(i_q, tl.arange(0, BLOCK_Q), starts, queries, BLOCK_Q, TILE_Q)
    return i_bh, rows, valid


@triton.jit
def rows_of_head(x, i_bh, heads, ALIGN: tl.constexpr):
    """One head of a tensor (`Heads`)."""
    start = x.start + ((i_bh // heads).to(tl.int64) * x.batch + (i_bh % heads).to(tl.int64) * x.head) * ALIGN
    return HeadRows(start, x.row * ALIGN)


@triton.jit
def rows_of(x, heads, ALIGN: tl.constexpr):
    """The head of a tensor that the program's second number says."""
    return rows_of_head(x, tl.program_id(1), heads, ALIGN)


@triton.jit
def load_rows(x, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [ROWS, BLOCK_D]; 0 where they are not valid, and beyond D."""
    o_d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (o_d < D)
    return tl.load(x.start + rows.to(tl.int64)[:, None] * x.distance + o_d, mask=mask, other=0.0)


@triton.jit
def rows_written(x, rows, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows of x [B, N, H, D], of the head that the program's second number says."""
    return rows_written_of_head(x, rows, tl.program_id(1), heads, tokens, D, BLOCK_D)


@triton.jit
def rows_written_of_head(x, rows, i_bh, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows of one head of x [B, N, H, D]."""
    place = ((i_bh // heads).to(tl.int64) * tokens + rows[:, None]) * heads + i_bh % heads
    return x + place * D + tl.arange(0, BLOCK_D)


@triton.jit
def store_rows(x, rows, valid, values, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x [B, N, H, D], of the head that the program's second number says."""
    store_rows_of_head(x, rows, valid, values, tl.program_id(1), heads, tokens, D, BLOCK_D)


@triton.jit
def store_rows_of_head(x, rows, valid, values, i_bh, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head of x [B, N, H, D]."""
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)
    p_rows = rows_written_of_head(x, rows, i_bh, heads, tokens, D, BLOCK_D)
    tl.store(p_rows, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_words(
    words, number, slot_q, slot_k, needed, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """SLOTS bits from key slot `slot_k` on of queries `slot_q`, as words of the first 64 and the next.

    Of the partial block `number`; all ones, and nothing is read, unless `needed` (None: always).
    """
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    p_words = words + (number.to(tl.int64) * WORDS + slot_k // 64) * BLOCK_Q + slot_q
    if needed is None:
        low = tl.load(p_words)
        high = tl.load(p_words + BLOCK_Q) if SLOTS > 64 else low
    else:
        mask = slot_q < tl.where(needed, BLOCK_Q, 0)
        low = tl.load(p_words, mask=mask, other=-1)
        high = tl.load(p_words + BLOCK_Q, mask=mask, other=-1) if SLOTS > 64 else low
    if SLOTS < 64:
        low = low >> (slot_k % 64)
    return low, high


@triton.jit
def holds(low, high, slot, SLOTS: tl.constexpr):
    """Whether the words hold a slot: bool, for words and slots that broadcast.

    A shift by 0 to 7 and a test of bit 0, 8, 16 or 24 read a slot's bit. In the layout of a matrix product the shift
    depends on the thread alone, so its slots share it. The tested bit is known when compiling.
    """
    if SLOTS > 64:
        low = tl.where(slot < 64, low, high)
    half = low.to(tl.int32)
    if SLOTS > 32:
        half = tl.where(slot % 64 < 32, half, (low >> 32).to(tl.int32))
    return ((half >> (slot % 8)) & (1 << (slot % 32 // 8 * 8))) != 0
