"""Routed lists as the engine's kernels read them, in one launch: `block_sparse.triton_lists.Lists` without tables."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import tile_position


@triton.jit(do_not_specialize=["T", "H", "W", "blocks", "n_kept", "dense"])
def places_kernel(
    kept, places, spans, T, H, W, blocks, n_kept, dense,
    BLOCK: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Places [B, H, blocks, n_kept + dense] and spans [B, H, blocks, 5] of one list of critical blocks.

    Behind whole blocks, in order, come those with padding slots, the last one first, and then the `dense` blocks that
    every query block attends to.
    """
    row = tl.program_id(0).to(tl.int64)
    kept += row * n_kept
    places += row * (n_kept + dense)
    whole_seen = 0
    cut_seen = 0
    for first in range(0, n_kept, STEP):
        place = first + tl.arange(0, STEP)
        inside = place < n_kept
        block = tl.load(kept + place, mask=inside, other=0)
        if TILE_H == 0:
            corner = block * BLOCK
            whole = corner + BLOCK <= T * H * W
        else:
            t, h, w = tile_position(block, 0, H, W, TILE_T, TILE_H, TILE_W)
            corner = (t * H + h) * W + w
            whole = (t + TILE_T <= T) & (h + TILE_H <= H) & (w + TILE_W <= W)
        is_whole = (inside & whole).to(tl.int32)
        is_cut = inside.to(tl.int32) - is_whole
        whole_before = whole_seen + tl.cumsum(is_whole, 0) - is_whole
        cut_before = cut_seen + tl.cumsum(is_cut, 0) - is_cut
        place = tl.where(whole, whole_before, n_kept - 1 - cut_before)
        tl.store(places + place, tl.where(whole, corner, block), mask=inside)
        whole_seen += tl.sum(is_whole, 0)
        cut_seen += tl.sum(is_cut, 0)
    for first in range(0, dense, STEP):
        place = first + tl.arange(0, STEP)
        tl.store(places + n_kept + place, blocks + place, mask=place < dense)
    part = tl.arange(0, 8)
    ends = tl.where(part < 3, whole_seen, tl.where(part == 3, n_kept + dense, 0))
    tl.store(spans + row * 5 + part, ends, mask=part < 5)
