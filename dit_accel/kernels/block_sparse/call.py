"""The record of a block-sparse call, which every implementation takes, and the check of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments


class BlockSparseCall(NamedTuple):
    """A call, as every implementation takes it.

    q: [B, H, Nq, D]; k, v: [B, H, Nk, D]; any strides.
    lists, geometry, segments: what is listed, how both sides are cut, and where a sample's segments lie.
    scale: factor of the logits.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lists: BlockLists
    segments: Segments
    geometry: Geometry
    scale: float

    def pack(self) -> tuple[Any, ...]:
        """The arguments of the custom ops."""
        return *self[:3], *self.lists, *self.segments, self.geometry.pack(), self.scale

    @classmethod
    def unpack(cls, flat: Sequence[Any]) -> BlockSparseCall:
        """The inverse of `pack`."""
        q, k, v, *records, geometry, scale = flat
        return cls(q, k, v, BlockLists(*records[:5]), Segments(*records[5:]), Geometry.unpack(geometry), scale)


def check_call(call: BlockSparseCall) -> None:
    """Refuse wrong shapes, dtypes and devices, without waiting for the device."""
    _check_geometry(call.geometry)
    check_tensors(call)
    _check_lists(call.q, call.lists, call.geometry)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(call: BlockSparseCall) -> None:
    """The part of `check_call` that a plan's own lists and geometry leave."""
    q, k, v, _, segments, geometry, _ = call
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise DitAccelError(
            "Attention needs q [B, H, Nq, D] and k, v [B, H, Nk, D] with the same B, H and D, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise DitAccelError(
            "Attention needs q, k and v of one dtype among bfloat16, float16, float32 and float64, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}. Cast them first."
        )
    if not q.device == k.device == v.device:
        raise DitAccelError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")
    _check_segments(q, k, geometry, segments)


def _check_geometry(geometry: Geometry) -> None:
    for name in ("grid", "query_grid", "tile_q", "tile_k"):
        sizes = getattr(geometry, name)
        if sizes is not None and (len(sizes) != 3 or any(size < 1 for size in sizes)):
            raise DitAccelError(f"{name} needs (frames, rows, columns), each at least 1, got {tuple(sizes)}.")
    for side in ("q", "k"):
        block, tile = getattr(geometry, f"block_{side}"), getattr(geometry, f"tile_{side}")
        if block < 1:
            raise DitAccelError(f"Blocks hold at least one token, got {block}.")
        if tile is not None and math.prod(tile) != block:
            raise DitAccelError(
                f"tile_{side}={tile} holds {math.prod(tile)} tokens, but the block {block}. Make them equal."
            )
    if geometry.conditioning < 0 or geometry.text < 0:
        raise DitAccelError(f"conditioning and text must be >= 0, got {geometry.conditioning} and {geometry.text}.")
    if geometry.partial_blocks is not None and geometry.partial_blocks < 0:
        raise DitAccelError(f"partial_blocks must be >= 0 or None, got {geometry.partial_blocks}.")


def _check_segments(q: torch.Tensor, k: torch.Tensor, geometry: Geometry, segments: Segments) -> None:
    given = [start is not None for start in segments[:3]]
    if any(given) and not all(given):
        raise DitAccelError("Give visual_start, conditioning_start and text_start together, or none of them.")
    for name, want, have in (
        ("q", geometry.query_order.grid.tokens, q.shape[2]),
        ("k and v", geometry.key_order.grid.tokens, k.shape[2]),
    ):
        if have < want or (have != want and not any(given)):
            raise DitAccelError(
                f"grid {geometry.grid}, {geometry.conditioning} conditioning and {geometry.text} text tokens need "
                f"{name} with {want} rows, got {have}. To leave rows out, give the three starts."
            )
    for name, tensor in zip(segments._fields, segments, strict=True):
        if tensor is not None and (tensor.shape != q.shape[:1] or tensor.dtype != torch.int32):
            raise DitAccelError(
                f"{name} must be int32 [{q.shape[0]}], one per sample, got {tensor.dtype} {tuple(tensor.shape)}."
            )


def _check_lists(q: torch.Tensor, lists: BlockLists, geometry: Geometry) -> None:
    blocks, rows = geometry.query_order.blocks, tuple(lists.indices.shape[:-1])
    if rows not in ((blocks,), (q.shape[0], q.shape[1], blocks)):
        raise DitAccelError(
            f"kv_indices must be [{blocks}, width] or [{q.shape[0]}, {q.shape[1]}, {blocks}, width] for {blocks} query "
            f"blocks of {geometry.block_q}, got {tuple(lists.indices.shape)}."
        )
    if tuple(lists.counts.shape) != rows:
        raise DitAccelError(f"kv_counts must be {list(rows)}, as kv_indices, got {tuple(lists.counts.shape)}.")
    if lists.indices.dtype != torch.int32 or lists.counts.dtype != torch.int32:
        raise DitAccelError(f"Block lists must be int32, got {lists.indices.dtype} and {lists.counts.dtype}.")
    partial, tables = lists.partial, lists.tables
    if partial is not None and (partial.shape != lists.indices.shape or partial.dtype != torch.bool):
        raise DitAccelError(
            f"partial must be bool {tuple(lists.indices.shape)}, got {partial.dtype} {tuple(partial.shape)}."
        )
    if partial is not None and tables is None:
        raise DitAccelError("partial marks blocks that the tables decide, but tables is None. Give both or neither.")
    if tables is not None and (tables.ndim != 1 or tables.dtype != torch.int32):
        raise DitAccelError(f"tables must be int32 [words], got {tables.dtype} {tuple(tables.shape)}.")
    for name, tensor in zip(("kv_indices", "kv_counts", "partial", "tables"), lists[:4], strict=True):
        if tensor is not None and tensor.device != q.device:
            raise DitAccelError(f"{name} must be on {q.device} as q is, got {tensor.device}. Move the plan there.")
