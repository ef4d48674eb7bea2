"""What the Triton kernels read of a block: where its tokens lie, rows of one head, and bits of allowed pairs.

Nothing is permuted or padded in memory: the rows of a 3-D tile are arithmetic on its number. Blocks are numbered as in
`order.TokenOrder`; a raster block has ``TILE_H == 0``. A program's second number is its head, counted over all samples.
One head of a tensor is a pair: where its rows begin, and the distance from row to row in elements.

A query's keys in one block are a set of slots, and a set of 64 slots is one 64-bit word. `partial_words_kernel` reads
the packed tables (`masks.Mask.pack`) once a call, for all heads. Forward and backward load the words and test one bit
a pair. Words are int64 [partial blocks, ceil(BLOCK_K / 64), BLOCK_Q], bit s of word w for slot 64 w + s.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integers of all kernels that are known at run time: no value of theirs has a binary of its own.
RUNTIME = (
    "q_batch", "q_head", "q_row", "q_column", "k_batch", "k_head", "k_row", "k_column", "v_batch", "v_head", "v_row",
    "v_column", "g_batch", "g_head", "g_row", "g_column", "o_batch", "o_head", "o_row", "o_column", "p_batch", "p_head",
    "p_row", "e_batch", "e_head", "e_row", "x_batch", "x_head", "x_row", "T", "H", "W", "QT", "QH", "QW", "heads",
    "tokens", "key_tokens", "query_tokens", "blocks", "key_blocks", "query_blocks", "width", "dense", "topk",
    "skip", "training", "usual_visual", "usual_conditioning", "usual_text", "usual_length", "given", "visual_start",
    "conditioning_start", "text_start", "visual", "conditioning", "text", "query_visual", "query_conditioning",
    "query_text", "tiles_h", "tiles_w", "query_tiles_h", "query_tiles_w", "visual_blocks", "conditioning_blocks",
    "query_visual_blocks", "query_conditioning_blocks", "per_head", "own_queries", "shared_rows",
)  # fmt: skip


@triton.jit
def starts_of(i_b, visual_starts, conditioning_starts, text_starts, text_lens, usual, given):
    """Where one sample's visual, conditioning and text tokens begin, and its valid text tokens.

    They are the four numbers of `usual` unless `given`: its bit 0 says that the starts are read, bit 1 the length.
    """
    visual, conditioning, text, length = usual
    placed = (given & 1) != 0
    starts = (
        tl.load(visual_starts + i_b, mask=placed, other=visual),
        tl.load(conditioning_starts + i_b, mask=placed, other=conditioning),
        tl.load(text_starts + i_b, mask=placed, other=text),
    )
    return starts, tl.load(text_lens + i_b, mask=(given & 2) != 0, other=length)


@triton.jit
def list_of(row, entries, spans, width):
    """Where a list and its parts end, and the number of its first partial block; see `triton_lists.OrderedLists`."""
    p_span = spans + row.to(tl.int64) * 5
    pure, clean, tabled, count = tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), tl.load(p_span + 3)
    return entries + row.to(tl.int64) * width, pure, clean, tabled, count, tl.load(p_span + 4)


@triton.jit
def tile_position(block, slot, H, W, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Frame, row and column of slots of a tile: the tile's corner plus the slot's place in it."""
    tiles_h = tl.cdiv(H, TILE_H)
    tiles_w = tl.cdiv(W, TILE_W)
    t = block // (tiles_h * tiles_w) * TILE_T + slot // (TILE_H * TILE_W)
    h = block // tiles_w % tiles_h * TILE_H + slot // TILE_W % TILE_H
    w = block % tiles_w * TILE_W + slot % TILE_W
    return t, h, w


@triton.jit
def places_in(slot, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Raster distance of slots of a visual block from its first slot; beyond the grid it is another token's."""
    if TILE_H == 0:
        place = slot
    else:
        place = (slot // (TILE_H * TILE_W) * H + slot // TILE_W % TILE_H) * W + slot % TILE_W
    return place


@triton.jit
def locate(
    block, slot, visual_start, conditioning_start, text_start, T, H, W, conditioning, text,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Row in memory, validity and raster index of slots of any block; the index is 0 outside the visual tokens."""
    visual = T * H * W
    if TILE_H == 0:
        visual_blocks = tl.cdiv(visual, BLOCK)
        raster = block * BLOCK + slot
        inside = raster < visual
    else:
        visual_blocks = tl.cdiv(T, TILE_T) * tl.cdiv(H, TILE_H) * tl.cdiv(W, TILE_W)
        t, h, w = tile_position(block, slot, H, W, TILE_T, TILE_H, TILE_W)
        raster = (t * H + h) * W + w
        inside = (t < T) & (h < H) & (w < W)
    conditioning_blocks = tl.cdiv(conditioning, BLOCK)
    is_visual = block < visual_blocks
    is_conditioning = (block >= visual_blocks) & (block < visual_blocks + conditioning_blocks)
    # The block's segment: its first row, and the slot's place in it.
    behind = block - visual_blocks
    behind = tl.where(is_conditioning, behind, behind - conditioning_blocks)
    place = behind * BLOCK + slot
    limit = tl.where(is_conditioning, conditioning, text)
    start = tl.where(is_conditioning, conditioning_start, text_start)
    row = tl.where(is_visual, visual_start + raster, start + place)
    valid = tl.where(is_visual, inside, place < limit)
    raster = tl.where(is_visual & valid, raster, 0)
    return row, valid, raster


@triton.jit
def first_slots(count):
    """The slots 0, ..., count - 1 of a word, for any count: int64."""
    one = tl.minimum(tl.maximum(count, 0), 64).to(tl.int64) * 0 + 1
    return tl.where(count > 63, -one, (one << tl.minimum(tl.maximum(count, 0), 63)) - one)


@triton.constexpr_function
def repeated(distance):
    """A word, as a signed number, with a bit at each multiple of `distance` slots, a power of two."""
    word = sum(1 << slot for slot in range(0, 64, distance))
    return word - (word >> 63 << 64)


@triton.jit
def block_at(
    block, starts, T, H, W, conditioning, text, BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):  # fmt: skip
    """Where any block lies, for `rows_at` and `held_at`: numbers alone, no slots."""
    visual_start, conditioning_start, text_start = starts
    visual = T * H * W
    if TILE_H == 0:
        visual_blocks = tl.cdiv(visual, BLOCK)
        t, h, w = block, block, block
        corner = block * BLOCK
    else:
        tiles_h, tiles_w = tl.cdiv(H, TILE_H), tl.cdiv(W, TILE_W)
        visual_blocks = tl.cdiv(T, TILE_T) * tiles_h * tiles_w
        line = block // tiles_w
        t, h, w = line // tiles_h * TILE_T, line % tiles_h * TILE_H, block % tiles_w * TILE_W
        corner = (t * H + h) * W + w
    behind = block - visual_blocks
    is_text = behind >= tl.cdiv(conditioning, BLOCK)
    is_visual = behind < 0
    behind = tl.where(is_text, behind - tl.cdiv(conditioning, BLOCK), behind)
    first = tl.where(is_visual, visual_start, tl.where(is_text, text_start, conditioning_start))
    size = tl.where(is_visual, visual, tl.where(is_text, text, conditioning))
    return is_visual, first, size, tl.where(is_visual, corner, behind * BLOCK), t, h, w


@triton.jit
def rows_at(where, visual_start, slot, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """A row in memory for every slot, some token's for padding slots: int64. It is not read past its segment.

    A segment without tokens has the first visual row.
    """
    is_visual, first, size, place, _, _, _ = where
    if TILE_H > 0:
        slot = tl.where(is_visual, places_in(slot, H, W, TILE_H, TILE_W), slot)
    first = tl.where(size > 0, first, visual_start)
    return (first + tl.minimum(place + slot, tl.maximum(size, 1) - 1)).to(tl.int64)


@triton.jit
def held_at(where, first, T, H, W, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Which of the 64 slots from `first` on hold a token, as a word: int64."""
    is_visual, _, size, place, t, h, w = where
    word = first_slots(size - place - first)
    if TILE_H > 0:
        columns = first_slots(tl.minimum(W - w, TILE_W) - first % TILE_W) * repeated(TILE_W)
        rows = first_slots(tl.minimum(H - h, TILE_H) * TILE_W - first % (TILE_H * TILE_W)) * repeated(TILE_H * TILE_W)
        frames = first_slots((T - t) * (TILE_H * TILE_W) - first)
        word = tl.where(is_visual, frames & rows & columns, word)
    return word


@triton.jit
def rows_of_head(x, i_bh, strides, heads, ALIGN: tl.constexpr):
    """One head of x [B, H, N, D], whose strides (batch, head, row) come divided by ALIGN."""
    batch, head, row = strides
    start = x + ((i_bh // heads).to(tl.int64) * batch + (i_bh % heads).to(tl.int64) * head) * ALIGN
    return start, row * ALIGN


@triton.jit
def rows_of(x, strides, heads, ALIGN: tl.constexpr):
    """This program's head of x."""
    return rows_of_head(x, tl.program_id(1), strides, heads, ALIGN)


@triton.jit
def load_rows(x, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [ROWS, BLOCK_D]; 0 where they are not valid, and beyond D."""
    start, distance = x
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(start + rows.to(tl.int64)[:, None] * distance + o_d, mask=valid[:, None] & (o_d < D), other=0.0)


@triton.jit
def rows_written(x, rows, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows of this program's head of x [B, N, H, D]."""
    i_bh = tl.program_id(1)
    place = ((i_bh // heads).to(tl.int64) * tokens + rows[:, None]) * heads + i_bh % heads
    return x + place * D + tl.arange(0, BLOCK_D)


@triton.jit
def store_rows(x, rows, valid, values, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of this program's head of x [B, N, H, D]."""
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)
    tl.store(rows_written(x, rows, heads, tokens, D, BLOCK_D), values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def below(count):
    """The slots 0, ..., count - 1 as a word, for any count: int64."""
    count = tl.minimum(tl.maximum(count, 0), 64).to(tl.int64)
    one = tl.full([1], 1, tl.int64)
    return tl.where(count > 63, -one, (one << tl.minimum(count, 63)) - one)


@triton.jit
def slots_between(left, right, base, step):
    """The slots of [left, right) that are a multiple of `step` away from `base`: int64, slots 0 to 63."""
    slots = below(right) & ~below(left)
    if step > 1:
        one = tl.full([1], 1, tl.int64)
        comb = slots * 0
        first = ((base % step) + step) % step
        for i in range(tl.cdiv(64, step)):
            slot = (first + i * step).to(tl.int64)
            comb |= tl.where(slot < 64, one << tl.minimum(slot, 63), 0)
        slots &= comb
    return slots


@triton.jit
def axis_sees(start, stop, step, key):
    seen = (key >= start) & (key < stop)
    if step > 1:
        seen = seen & ((key - start) % step == 0)
    return seen


@triton.jit
def line_of(i, block, T, H, W, BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The i-th image row in a visual block: frame, row, its slots [left, right) and the column of slot 0."""
    if TILE_H == 0:
        line = block * BLOCK // W + i
        t, h = line // H, line % H
        column = block * BLOCK - line * W
        left = tl.maximum(-column, 0)
        right = tl.minimum(W - column, BLOCK)
    else:
        tiles_h = tl.cdiv(H, TILE_H)
        tiles_w = tl.cdiv(W, TILE_W)
        t = block // (tiles_h * tiles_w) * TILE_T + i // TILE_H
        h = block // tiles_w % tiles_h * TILE_H + i % TILE_H
        left = i * TILE_W
        column = block % tiles_w * TILE_W - left
        right = tl.minimum(left + TILE_W, W - column)
    right = tl.where((t < T) & (h < H), right, left)
    return tl.minimum(t, T - 1), tl.minimum(h, H - 1), left, right, column


@triton.jit
def seen_slots(
    tables, query, block, QH, QW, T, H, W,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The slots of a visual key block that each query (raster index) sees: words of slots 0-63 and 64-127."""
    if TILE_H == 0:
        lines = (tl.minimum(block * BLOCK + BLOCK, T * H * W) - 1) // W - block * BLOCK // W + 1
    else:
        lines = TILE_T * TILE_H
    frame, place = query // (QH * QW), query % (QH * QW)
    row, column_q = place // QW, place % QW
    low_word = query.to(tl.int64) * 0
    high_word = low_word
    for term in range(tl.load(tables)):
        header = tables + 1 + 8 * term
        kind = tl.load(header)
        off_t = tables + tl.load(header + 1)
        if kind == 0:
            off_h, off_w = tables + tl.load(header + 2), tables + tl.load(header + 3)
            step_t, step_h, step_w = tl.load(header + 4), tl.load(header + 5), tl.load(header + 6)
            start_t, stop_t = tl.load(off_t + 2 * frame), tl.load(off_t + 2 * frame + 1)
            start_h, stop_h = tl.load(off_h + 2 * row), tl.load(off_h + 2 * row + 1)
            start_w, stop_w = tl.load(off_w + 2 * column_q), tl.load(off_w + 2 * column_q + 1)
            if TILE_H == 0:
                for i in range(lines):
                    t, h, left, right, column = line_of(i, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                    seen = axis_sees(start_t, stop_t, step_t, t) & axis_sees(start_h, stop_h, step_h, h)
                    base = start_w - column
                    first = tl.maximum(base, left)
                    last = tl.where(seen, tl.minimum(stop_w - column, right), first)
                    low_word |= slots_between(first, last, base, step_w)
                    if BLOCK > 64:
                        high_word |= slots_between(first - 64, last - 64, base - 64, step_w)
            else:  # the same columns in every image row
                t, h, left, right, column = line_of(0, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                base = start_w - column
                first, last = tl.maximum(base, 0), tl.minimum(stop_w - column, right)
                across = slots_between(first, last, base, step_w)
                beyond = across * 0
                if TILE_W > 64:
                    beyond = slots_between(first - 64, last - 64, base - 64, step_w)
                for i in range(lines):
                    t, h, left, right, column = line_of(i, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                    seen = axis_sees(start_t, stop_t, step_t, t) & axis_sees(start_h, stop_h, step_h, h)
                    seen = seen & (left < right)
                    moved = across << (left % 64)
                    low_word |= tl.where(seen & (left < 64), moved, 0)
                    if BLOCK > 64:
                        high_word |= tl.where(seen, tl.where(left < 64, beyond, moved), 0)
        else:
            for i in range(lines):
                t, h, left, right, column = line_of(i, block, T, H, W, BLOCK, TILE_T, TILE_H, TILE_W)
                radius = tl.load(off_t + frame * T + t)
                middle = place - h * W - column  # slot at the query's own raster position
                first = tl.maximum(middle - radius + 1, left)
                last = tl.where(radius > 0, tl.minimum(middle + radius, right), first)
                low_word |= slots_between(first, last, 0, 1)
                if BLOCK > 64:
                    high_word |= slots_between(first - 64, last - 64, 0, 1)
    return low_word, high_word


@triton.jit(do_not_specialize=RUNTIME)
def partial_words_kernel(
    words, entries, spans, tables, T, H, W, QT, QH, QW, query_blocks, width,
    BLOCK_Q: tl.constexpr, TILE_QT: tl.constexpr, TILE_QH: tl.constexpr, TILE_QW: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_KT: tl.constexpr, TILE_KH: tl.constexpr, TILE_KW: tl.constexpr,
):  # fmt: skip
    """The words of the partial blocks of one list; the programs of the second axis share its blocks."""
    row = tl.program_id(0)
    list_row, pure, _, tabled, _, number = list_of(row, entries, spans, width)
    slot_q = tl.arange(0, BLOCK_Q)
    _, _, query = locate(
        row % query_blocks, slot_q, 0, 0, 0, QT, QH, QW, 0, 0, BLOCK_Q, TILE_QT, TILE_QH, TILE_QW
    )  # fmt: skip
    WORDS: tl.constexpr = (BLOCK_K + 63) // 64
    for i in range(pure + tl.program_id(1), tabled, tl.num_programs(1)):
        block = tl.load(list_row + i)
        low, high = seen_slots(tables, query, block, QH, QW, T, H, W, BLOCK_K, TILE_KT, TILE_KH, TILE_KW)
        p_words = words + (number + i - pure).to(tl.int64) * (WORDS * BLOCK_Q) + slot_q
        tl.store(p_words, low)
        if BLOCK_K > 64:
            tl.store(p_words + BLOCK_Q, high)


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
