"""Block lists as the Triton kernels read them. Device tensors throughout: nothing here waits for the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dit_accel.blocks import valid_tokens
from dit_accel.kernels.block_sparse.geometry import Geometry

PARTIAL = 0x40000000  # bit of an entry whose pairs the tables decide


class Lists(NamedTuple):
    """Lists per query block, blocks that need no masking first.

    Args:
        entries: int32 [rows, width]; block number, plus `PARTIAL` where the tables decide.
        pure: int32 [rows], entries at the head that are whole blocks of visual keys without padding slots.
        counts: int32 [rows].
    """

    entries: torch.Tensor
    pure: torch.Tensor
    counts: torch.Tensor


class Transposed(NamedTuple):
    """Lists per key block, one behind the other; query blocks ascend, so sums over them have a fixed order.

    Args:
        entries: int32 [leading * query_blocks * width].
        firsts: int32 [leading, key_blocks + 1], where each key block's entries begin.
    """

    entries: torch.Tensor
    firsts: torch.Tensor


def pack_lists(
    kv_indices: torch.Tensor,
    kv_counts: torch.Tensor,
    partial: torch.Tensor | None,
    tables: torch.Tensor | None,
    geometry: Geometry,
) -> Lists:
    """Order each list for the forward and dq kernels; arguments as in `api.block_sparse_attention`."""
    width = kv_indices.shape[-1]
    counts = kv_counts.reshape(-1)
    used = _used(kv_indices, kv_counts).reshape(-1, width)
    needs = _needs_tables(kv_indices, partial, tables, geometry).reshape(-1, width)
    entries = kv_indices.reshape(-1, width)
    slow = needs | _padded_blocks(geometry, kv_indices.device)[torch.where(used, entries, 0)]
    pure = used & ~slow
    pure_counts = pure.sum(-1, dtype=torch.int32)
    behind = pure_counts[:, None] + (used & slow).cumsum(-1, dtype=torch.int32) - 1
    place = torch.where(pure, pure.cumsum(-1, dtype=torch.int32) - 1, behind)
    place = torch.where(used, place, width)  # unused entries fall into a spare column
    packed = torch.zeros(len(entries), width + 1, dtype=torch.int32, device=entries.device)
    packed.scatter_(1, place.long(), torch.where(needs, entries | PARTIAL, entries))
    return Lists(packed[:, :width].contiguous(), pure_counts, counts.contiguous())


def transpose_lists(
    kv_indices: torch.Tensor,
    kv_counts: torch.Tensor,
    partial: torch.Tensor | None,
    tables: torch.Tensor | None,
    geometry: Geometry,
) -> Transposed:
    """Turn lists of key blocks into lists of query blocks by a stable sort."""
    query_blocks, width = kv_indices.shape[-2:]
    key_blocks = geometry.key_order.blocks
    keys = torch.where(_used(kv_indices, kv_counts), kv_indices, key_blocks).reshape(-1, query_blocks * width)
    needs = _needs_tables(kv_indices, partial, tables, geometry).reshape_as(keys)
    queries = torch.arange(query_blocks * width, dtype=torch.int32, device=keys.device) // width
    sorted_keys, order = keys.sort(dim=-1, stable=True)
    entries = torch.where(needs, queries | PARTIAL, queries).gather(-1, order)
    blocks = torch.arange(key_blocks + 1, dtype=torch.int32, device=keys.device).expand(len(keys), -1).contiguous()
    firsts = torch.searchsorted(sorted_keys, blocks, out_int32=True)
    start = torch.arange(len(keys), dtype=torch.int32, device=keys.device)[:, None] * (query_blocks * width)
    return Transposed(entries.flatten(), firsts + start)


def _used(kv_indices: torch.Tensor, kv_counts: torch.Tensor) -> torch.Tensor:
    return torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_counts[..., None]


def _needs_tables(
    kv_indices: torch.Tensor, partial: torch.Tensor | None, tables: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    if tables is None:
        return torch.zeros_like(kv_indices, dtype=torch.bool)
    visual = kv_indices < geometry.key_order.visual_blocks
    visual[..., geometry.query_order.visual_blocks :, :] = False
    return visual if partial is None else visual & partial


@functools.lru_cache(maxsize=64)
def _padded_blocks(geometry: Geometry, device: torch.device) -> torch.Tensor:
    """Key blocks whose slots need a check: bool [key_blocks]. Text blocks always, for text lengths vary."""
    order = geometry.key_order
    padded = torch.ones(order.blocks, dtype=torch.bool)
    padded[: order.visual_blocks] = valid_tokens(order) < order.block
    return padded.to(device)
