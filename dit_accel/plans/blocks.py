"""Block masks: which key blocks each query block visits, and which of them need the token predicate."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry
from dit_accel.kernels.router.portable import lists_of
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

    `visited` and `partial` are bool [..., query_order.visual_blocks, key_order.visual_blocks]; partial None: all full.
    """
    around = 0, key_order.dense_blocks, 0, query_order.dense_blocks
    visited = torch.nn.functional.pad(visited, around, value=dense)
    indices, counts = lists_of(visited, max(int(visited.sum(-1).max()), 1))
    lists = BlockLists(indices.contiguous(), counts)
    marked = torch.zeros_like(lists.used)
    if partial is not None:
        marked = lists.used & torch.nn.functional.pad(partial, around).gather(-1, lists.indices.long())
    return BlockMask(lists.indices, counts, marked, query_order, key_order)
