"""Where the tokens of a block lie in memory, as the Triton kernels compute it.

Nothing is permuted or padded in memory: the rows of a 3-D tile are arithmetic on its number. Blocks are numbered as in
`order.TokenOrder`; a raster block has ``TILE_H == 0``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def starts_of(i_b, visual_starts, conditioning_starts, text_starts, text_lens):
    """Where one sample's visual, conditioning and text tokens begin, and its valid text tokens."""
    starts = tl.load(visual_starts + i_b), tl.load(conditioning_starts + i_b), tl.load(text_starts + i_b)
    return starts, tl.load(text_lens + i_b)


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
    """Raster distance of slots of a visual block without padding slots from its first slot."""
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
    # one of three segments: its first row, and the slot's place in it
    behind = block - visual_blocks
    behind = tl.where(is_conditioning, behind, behind - conditioning_blocks)
    place = behind * BLOCK + slot
    limit = tl.where(is_conditioning, conditioning, text)
    start = tl.where(is_conditioning, conditioning_start, text_start)
    row = tl.where(is_visual, visual_start + raster, start + place)
    valid = tl.where(is_visual, inside, place < limit)
    raster = tl.where(is_visual & valid, raster, 0)
    return row, valid, raster
