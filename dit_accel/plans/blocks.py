"""Block masks: which key blocks each query block visits, and which of them need the token predicate."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.masks import Mask

MOST_PAIRS = 2**25  # of blocks; a mask in the making takes up to 50 bytes a pair, so under 2 GB


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """The visited blocks, as lists of key blocks per query block.

    A block is empty (not listed), full (every pair of its tokens is allowed) or partial. Routed masks have the leading
    dimensions [B, H], static ones none.

    Args:
        kv_indices: int32 [..., query_blocks, width], ascending; entries behind the count are 0.
        kv_counts: int32 [..., query_blocks].
        partial: bool, like `kv_indices`; False behind the count.
        query_order, key_order: the tokens of the blocks.
    """

    kv_indices: Tensor
    kv_counts: Tensor
    partial: Tensor
    query_order: TokenOrder
    key_order: TokenOrder

    @property
    def visited(self) -> int:
        """Blocks that are not empty, over batch and heads."""
        return int(self.kv_counts.sum())

    @property
    def total(self) -> int:
        leading = self.kv_counts[..., 0].numel()
        return leading * self.query_order.blocks * self.key_order.blocks

    @property
    def full(self) -> int:
        return self.visited - int(self.partial.sum())

    @property
    def density(self) -> float:
        return self.visited / self.total

    def dense(self) -> Tensor:
        """Visited blocks as a map: bool [..., query_blocks, key_blocks]."""
        lists = self.lists()
        return lists.map(lists.used, self.key_order.blocks)

    def lists(self, tables: Tensor | None = None) -> BlockLists:
        """The lists as kernels take them, with the packed predicate of the partial blocks."""
        return BlockLists(self.kv_indices, self.kv_counts, None if tables is None else self.partial, tables)

    @property
    def geometry(self) -> Geometry:
        """Where the blocks' tokens lie."""
        return Geometry.of(self.query_order, self.key_order, partial_blocks=int(self.partial.sum()))


def check_size(query_order: TokenOrder, key_order: TokenOrder) -> None:
    """Refuse a block mask with too many pairs of blocks for memory."""
    pairs = query_order.blocks * key_order.blocks
    if pairs > MOST_PAIRS:
        raise DitAccelError(
            f"A block mask is made for at most {MOST_PAIRS:,} pairs of blocks; {query_order.grid} in blocks of "
            f"{query_order.block:,} and {key_order.block:,} tokens has {pairs:,}. Use a smaller grid. In Python, "
            "larger blocks help too, and plan(...).pairs and .density need no block mask."
        )


def from_mask(mask: Mask, query_order: TokenOrder, key_order: TokenOrder) -> BlockMask:
    """The block mask of a token mask, without empty blocks; errors as in `check_size`."""
    check_size(query_order, key_order)
    counts = mask.block_pairs(query_order, key_order)
    valid = valid_tokens(query_order)[:, None] * valid_tokens(key_order)[None, :]
    return from_map(counts > 0, query_order, key_order, partial=counts < valid)


def from_map(
    visited: Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    partial: Tensor | None = None,
    *,
    dense: bool = True,
) -> BlockMask:
    """A block mask from a map of the visual blocks; conditioning and text rows and columns are full, or not `dense`.

    Args:
        visited: bool [..., query_order.visual_blocks, key_order.visual_blocks].
        partial: bool, like `visited`; entries of blocks that are not visited do not matter. None: all full.
    """
    extra = key_order.dense_blocks
    rows, columns = query_order.dense_blocks, key_order.visual_blocks
    leading = visited.shape[:-2]
    if extra or rows:
        visited = torch.nn.functional.pad(visited, (0, extra, 0, rows), value=dense)
        if partial is not None:
            partial = torch.nn.functional.pad(partial, (0, extra, 0, rows), value=False)
    counts = visited.sum(-1, dtype=torch.int32)
    width = max(int(counts.max()), 1)
    where = visited.reshape(-1, columns + extra).nonzero()
    row, column = where[:, 0], where[:, 1].to(torch.int32)
    first = counts.flatten().cumsum(0) - counts.flatten()
    slot = torch.arange(len(row), device=row.device) - first[row]
    flat = row * width + slot
    shape = (*leading, query_order.blocks, width)
    kv_indices = torch.zeros(shape, dtype=torch.int32, device=visited.device)
    kv_indices.view(-1)[flat] = column
    marked = torch.zeros(shape, dtype=torch.bool, device=visited.device)
    if partial is not None:
        marked.view(-1)[flat] = partial.reshape(-1, columns + extra)[row, where[:, 1]]
    return BlockMask(kv_indices, counts, marked, query_order, key_order)
