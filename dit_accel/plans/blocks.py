"""Block masks: which key blocks each query block visits, and which of them need the token predicate."""

from __future__ import annotations

import dataclasses

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.masks import Mask

MOST_PAIRS = 2**29  # of blocks; each takes 14 to 20 bytes while a sparse mask is made: 10 GiB for all


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """The visited blocks, as lists of key blocks per query block.

    A block is empty (not listed), full (every pair of a valid query and a valid key is allowed) or partial. Leading
    dimensions are absent for a static mask and [B, H] for a routed one.

    Args:
        kv_indices: int32 [..., query_blocks, width], ascending; entries past the count are 0.
        kv_counts: int32 [..., query_blocks].
        partial: bool, like `kv_indices`; False past the count.
        query_order, key_order: what the blocks hold.
    """

    kv_indices: torch.Tensor
    kv_counts: torch.Tensor
    partial: torch.Tensor
    query_order: TokenOrder
    key_order: TokenOrder

    @property
    def visited(self) -> int:
        """Blocks that are not empty, summed over batch and heads if there are any."""
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

    def dense(self) -> torch.Tensor:
        """Visited blocks as a map: bool [..., query_blocks, key_blocks]."""
        shape = (*self.kv_counts.shape, self.key_order.blocks + 1)
        listed = torch.arange(self.kv_indices.shape[-1], device=self.kv_counts.device) < self.kv_counts[..., None]
        slots = torch.where(listed, self.kv_indices, self.key_order.blocks).long()
        seen = torch.zeros(shape, dtype=torch.bool, device=self.kv_counts.device)
        return seen.scatter_(-1, slots, True)[..., :-1]

    def lists(self, tables: torch.Tensor | None = None) -> BlockLists:
        """The lists as kernels take them, with the packed predicate of the partial blocks."""
        return BlockLists(self.kv_indices, self.kv_counts, None if tables is None else self.partial, tables)

    @property
    def geometry(self) -> Geometry:
        """Where the blocks' tokens lie."""
        return Geometry.of(self.query_order, self.key_order, partial_blocks=int(self.partial.sum()))


def check_size(query_order: TokenOrder, key_order: TokenOrder) -> None:
    """See before a block mask is made that it fits into memory: every pair of blocks is looked at.

    Raises:
        DitAccelError: there are too many.
    """
    pairs = query_order.blocks * key_order.blocks
    if pairs > MOST_PAIRS:
        raise DitAccelError(
            f"A block mask is made for at most {MOST_PAIRS:,} pairs of blocks; {query_order.grid} in blocks of "
            f"{query_order.block:,} and {key_order.block:,} tokens has {pairs:,}. Take a smaller grid or larger "
            "blocks; a plan's pairs and density need no block mask."
        )


def from_mask(mask: Mask, query_order: TokenOrder, key_order: TokenOrder) -> BlockMask:
    """The block mask that covers a token mask exactly: no visited block is empty, and full ones are known.

    Raises:
        DitAccelError: there are too many blocks.
    """
    check_size(query_order, key_order)
    counts = mask.block_pairs(query_order, key_order)
    valid = valid_tokens(query_order)[:, None] * valid_tokens(key_order)[None, :]
    return from_map(counts > 0, query_order, key_order, partial=counts < valid)


def from_map(
    visited: torch.Tensor, query_order: TokenOrder, key_order: TokenOrder, partial: torch.Tensor | None = None
) -> BlockMask:
    """A block mask from a map of the visual blocks; conditioning and text rows and columns are full.

    Args:
        visited: bool [..., query_order.visual_blocks, key_order.visual_blocks].
        partial: bool, like `visited`; entries of blocks that are not visited do not matter. None: all full.
    """
    extra = key_order.dense_blocks
    rows, columns = query_order.dense_blocks, key_order.visual_blocks
    leading = visited.shape[:-2]
    if extra or rows:
        visited = torch.nn.functional.pad(visited, (0, extra, 0, rows), value=True)
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
