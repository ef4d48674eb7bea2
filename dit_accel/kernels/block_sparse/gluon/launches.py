"""The Gluon implementation, for compute capability 9.0: a forward kernel, and two for the gradients.

They read the same lists and the same bits of partial blocks as Triton's, and the backward reads the forward's LSE, so
that a call's forward and backward may be of different implementations. Query blocks have 128 tokens and key blocks 64
or 128, in raster order or in tiles of any shape.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import BlockSparseCall, Shape
from dit_accel.kernels.block_sparse.gluon.copies import KEYS
from dit_accel.kernels.block_sparse.gluon.dkdv import block_sparse_gluon_dkdv_kernel
from dit_accel.kernels.block_sparse.gluon.dq import block_sparse_gluon_dq_kernel
from dit_accel.kernels.block_sparse.gluon.forward import block_sparse_gluon_fwd_kernel
from dit_accel.kernels.block_sparse.triton import RASTER, Kept, TritonCall, likeness
from dit_accel.kernels.block_sparse.triton_configs import Launch

__all__ = ["backward", "forward"]

LOG2E = math.log2(math.e)
ROWS = 64  # of a consumer
ENDLESS = 0x7FFF0000  # an axis of a descriptor that bounds nothing
STAGES = 3  # steps of 128 keys and values in shared memory, as many as it holds with D = 128
STAGES_DQ, STAGES_DKDV = 2, 4  # of dk and dv: units of 64 queries and gradients
LAUNCH = Launch(4, STAGES, KEYS.value, registers=168)  # 12 warps in all; the kernel shares registers out


def forward(call: BlockSparseCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE fp32 [B, H, Nq].

    A tensor that the copy engine cannot address is copied, and so is q if the scale is not above 0.
    """
    q, k, v, lists, _, geometry, scale = call
    like = likeness(call)
    kept = _KEPT.get(like)
    if kept is not None:
        out, lse, behind = kept.start(call)
        descriptors = [_like(known, x) for x, pair in zip((q, k, v, out), kept.others, strict=True) for known in pair]
        with torch.cuda.device(q.device):
            kept.forward.again(lse, *descriptors, *behind)
        return out.transpose(1, 2), lse
    read = q, k, v
    host = TritonCall(call)
    ordered, (out, lse) = host.ordered(), host.room(q)
    if scale <= 0:
        q, scale = q * math.copysign(1.0, scale) if scale else torch.zeros_like(q), -scale or 1.0
    batch, heads, tokens, dim = q.shape
    tile_q, tile_k = geometry.tile_q or RASTER, geometry.tile_k or RASTER
    half = half_of(tile_q)
    sides = (q, geometry.query_grid, half, ROWS), *((x, geometry.grid, tile_k, geometry.block_k) for x in (k, v))
    descriptors, distances = zip(*(describe(*side) for side in sides), strict=True)
    (written, _) = describe(out.transpose(1, 2), geometry.query_grid, half, ROWS)
    pairs = *descriptors, written
    places, spans, words = host.masked(ordered)
    launched = tuning.launch(
        block_sparse_gluon_fwd_kernel, (host.query_blocks, heads, batch),
        (
            lse, *(descriptor for pair in pairs for descriptor in pair), places, spans, words, *host.segments,
            *(distance for three in distances for distance in three), scale * LOG2E,
            *sizes(geometry.key_order), *sizes(geometry.query_order), geometry.query_order.grid.text,
            heads, tokens, host.query_blocks, lists.indices.shape[-1], int(lists.indices.ndim == 4),
            1 - host.own_queries,
        ),
        constants(dim, geometry.block_k, tile_q, tile_k), (LAUNCH,), (),
    )  # fmt: skip
    in_place = all(x.data_ptr() == pair[0].base.data_ptr() for x, pair in zip(read, descriptors, strict=True))
    if launched is not None and in_place:
        known = [[_like(each, None) for each in pair] for pair in pairs]
        host.keep(_KEPT, like, launched.behind(1 + 2 * len(pairs) + 7), known)
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: BlockSparseCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] laid out in memory as [B, N, H, D]; the same bits in every run."""
    q, k, v, lists, _, geometry, scale = call
    host = TritonCall(call)
    ordered, transposed = host.both_ways()
    places, spans, words = host.masked(ordered)
    batch, heads, _, dim = q.shape
    tile_q, tile_k = geometry.tile_q or RASTER, geometry.tile_k or RASTER
    half, part = half_of(tile_q), tile_k if geometry.block_k == ROWS else half_of(tile_k)
    statistics = q.new_empty(batch, heads, host.query_blocks, 4 * ROWS, dtype=torch.float32)
    dq, dk, dv = (host.room_for(x) for x in (q, k, v))
    of_queries = [describe(x, geometry.query_grid, half, ROWS) for x in (q, grad_out.to(q.dtype), out)]
    whole, parts = (
        [describe(x, geometry.grid, *box) for x in (k, v)] for box in ((tile_k, geometry.block_k), (part, ROWS))
    )
    orders = *sizes(geometry.key_order), *sizes(geometry.query_order), geometry.query_order.grid.text
    *segments, given = host.segments
    shared = int(lists.indices.ndim == 4), 1 - host.own_queries

    sides = *of_queries, *whole
    written, _ = describe(dq.transpose(1, 2), geometry.query_grid, half, ROWS)
    tuning.launch(
        block_sparse_gluon_dq_kernel, (host.query_blocks, heads, batch),
        (
            lse, lse if grad_lse is None else grad_lse.contiguous(), statistics,
            *(each for pair, _ in sides for each in pair), *written, places, spans, words,
            *segments, given + 4 * (grad_lse is not None), *(each for _, three in sides for each in three), scale,
            *orders, heads, q.shape[2], host.query_blocks, lists.indices.shape[-1], *shared,
        ),
        {**constants(dim, geometry.block_k, tile_q, tile_k), "STAGES": STAGES_DQ}, (LAUNCH,), (),
    )  # fmt: skip

    sides = *of_queries[:2], *parts
    both = (describe(x.transpose(1, 2), geometry.grid, part, ROWS)[0] for x in (dk, dv))
    entries, places, numbers, firsts = transposed
    tuning.launch(
        block_sparse_gluon_dkdv_kernel, (host.key_blocks, heads, batch),
        (
            statistics, *(each for pair, _ in sides for each in pair), *(each for pair in both for each in pair),
            entries, places, places if numbers is None else numbers, firsts, words,
            *segments, given + 4 * (numbers is not None), *(each for _, three in sides for each in three), scale,
            *orders, heads, k.shape[2], host.query_blocks, host.key_blocks, *shared,
        ),
        {**constants(dim, geometry.block_k, tile_q, tile_k), "PART_K": part, "STAGES": STAGES_DKDV}, (LAUNCH,), (),
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_KEPT: dict[Any, Kept] = {}


def _like(known: TensorDescriptor, base: torch.Tensor | None) -> TensorDescriptor:
    """A descriptor like a known one, which was checked, of another tensor."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(vars(known), base=base)
    return made


def constants(head_dim: int, block_k: int, tile_q: Shape, tile_k: Shape) -> dict[str, Any]:
    """The kernel's compile-time constants; (0, 0, 0) is the tile of raster order."""
    return {
        "D": head_dim,
        "BLOCK_K": block_k,
        "TILE_Q": tile_q,
        "HALF": half_of(tile_q),
        "TILE_K": tile_k,
        "STAGES": STAGES,
    }


def half_of(tile: Shape) -> Shape:
    """The part of a query tile that one consumer has: the first half of its slots."""
    axis = next((i for i, size in enumerate(tile) if size > 1), 0)
    return tuple(size // 2 if i == axis else size for i, size in enumerate(tile))  # type: ignore[return-value]


def describe(
    x: torch.Tensor, grid: Shape, tile: Shape, rows: int
) -> tuple[tuple[TensorDescriptor, TensorDescriptor], tuple[int, int, int]]:
    """How the copy engine finds rows of x [B, H, N, D], see `forward`.

    Args:
        grid: of the visual tokens.
        tile: what one copy brings of it; (0, 0, 0) for raster order, where runs bring everything.
        rows: that one copy brings.

    Returns:
        The descriptors of tiles and of runs. The distance from sample to sample in rows. The distance from head to head
        in rows and in columns.
    """
    distances = _distances(x)
    if distances is None:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        distances = _distances(x)
        assert distances is not None
    row, by_batch, by_head, column = distances
    columns = (x.shape[1] - 1) * column + x.shape[3]
    tiled, run = (TensorDescriptor(x, *box) for box in _boxes_in_rows(grid, tile, rows, x.shape[3], row, columns))
    return (tiled, run), (by_batch, by_head, column)


@functools.lru_cache(maxsize=256)
def _boxes_in_rows(
    grid: Shape, tile: Shape, rows: int, dim: int, row: int, columns: int
) -> tuple[tuple[Any, ...], ...]:
    """Shape, strides, box and layout of both descriptors of a tensor with rows of `columns`, `row` elements apart."""
    _, height, width = grid
    run = [ENDLESS, ENDLESS, 1 << 30, columns], [(1 << 34) - row, row, row, 1], [1, 1, rows, dim]
    tiled = [ENDLESS, *grid, columns], [row, height * width * row, width * row, row, 1], [1, *tile, dim]
    return tuple(
        (*box, gl.NVMMASharedLayout(128, 16, rank=len(box[0]))) for box in ((run if tile == RASTER else tiled), run)
    )


def _distances(x: torch.Tensor) -> tuple[int, int, int, int] | None:
    """Elements from row to row; rows from sample to sample and from head to head; elements from head to head.

    None if the copy engine cannot have it so.
    """
    batch, heads, tokens, dim = x.shape
    by_batch, by_head, row, element = x.stride()
    row = dim if tokens == 1 else row
    by_batch, by_head = by_batch if batch > 1 else 0, by_head if heads > 1 else 0
    if element != 1 or row < dim or row % 8 or x.data_ptr() % 16 or by_batch % row:
        return None
    if by_head % row == 0:
        return row, by_batch // row, by_head // row, 0
    return None if by_head % 8 else (row, by_batch // row, 0, by_head)


@functools.cache
def sizes(order: Any) -> tuple[int, ...]:
    """What the kernel is told of one side, a `TokenOrder`."""
    grid = order.grid
    _, tiles_h, tiles_w = order.tiles
    return (
        *grid.shape, tiles_h, tiles_w, grid.visual, order.visual_blocks, grid.conditioning, order.conditioning_blocks
    )  # fmt: skip
