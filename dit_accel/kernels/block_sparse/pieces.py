"""Few long lists in pieces: a kernel has a program for each list, and most of a GPU would wait for a few of them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs
from dit_accel.kernels.impls import Implementation

MOST, LEAST = 16, 0.9  # pieces, and the share of the time that they must come down to
MERGE, UNIT = 64, 64  # the merge of a call, in the time of a key block of so many keys


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pieces_of(call: BlockSparseInputs, chosen: Implementation) -> int:
    """In how many pieces a call's lists are done first; known from shapes, without waiting for the device."""
    if chosen.list_start is None:
        return 1
    width, geometry = call.lists.indices.shape[-1], call.geometry
    rows = math.prod(call.q.shape[:2]) * geometry.query_order.blocks
    return fastest(rows, width, geometry.block_k, multiprocessors(call.q.device), chosen.list_start)


def fastest(rows: int, width: int, block_k: int, programs: int, start: float) -> int:
    """In how many pieces `rows` lists of `width` key blocks are done first by so many programs at a time.

    Programs are alike, so that they end in waves.

    Args:
        block_k: keys of a block.
        start: `Implementation.list_start`.
    """

    def time(pieces: int) -> float:
        steps = start + math.ceil(width / pieces) * block_k / UNIT
        return math.ceil(rows * pieces / programs) * steps + MERGE * (pieces > 1)

    best = min(range(1, min(MOST, width) + 1), key=time)
    return best if time(best) < LEAST * time(1) else 1


def in_pieces(call: BlockSparseInputs, pieces: int) -> BlockSparseInputs:
    """A call whose queries come once for each piece of their list, piece by piece.

    Args:
        call: its queries have a grid of their own, in raster order, and its lists no tables.
    """
    lists, geometry = call.lists, call.geometry
    assert geometry.own_queries and geometry.tile_q is None and lists.tables is None
    width = math.ceil(lists.indices.shape[-1] / pieces)
    indices = torch.nn.functional.pad(lists.indices, (0, width * pieces - lists.indices.shape[-1]))
    indices = indices.unflatten(-1, (pieces, width)).movedim(-2, -3).flatten(-3, -2)
    starts = torch.arange(0, width * pieces, width, dtype=torch.int32, device=indices.device)[:, None]
    counts = (lists.counts[..., None, :] - starts).clamp(0, width).flatten(-2)
    queries = call.q.shape[2]
    geometry = dataclasses.replace(
        geometry, query_grid=(pieces, 1, queries), tile_q=(1, 1, geometry.block_q), partial_blocks=None
    )
    return call._replace(q=call.q.repeat(1, 1, pieces, 1), lists=BlockLists(indices, counts), geometry=geometry)


def merged(out: Tensor, lse: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] and LSE [B, H, N] over whole lists, each of which has a key, from those of their pieces.

    Args:
        out, lse: [B, H, pieces * N, D] and [B, H, pieces * N], of a call that `in_pieces` made.
    """
    parts = lse.unflatten(2, (pieces, -1))
    total = parts.logsumexp(2)
    shares = torch.exp(parts - total[:, :, None])[..., None]
    whole = (out.unflatten(2, (pieces, -1)).to(lse.dtype) * shares).sum(2)
    return whole.to(out.dtype).transpose(1, 2).contiguous().transpose(1, 2), total
