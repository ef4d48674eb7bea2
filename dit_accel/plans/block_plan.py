"""Plans of methods that are defined on whole blocks, such as the radial mask of the published code."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.triton_configs import LARGEST_BLOCK
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans import blocks
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.plan import building
from dit_accel.plans.static import Order, StaticPlan
from dit_accel.plans.tiles import Tile
from dit_accel.tokens import TokenGrid


class BlockPlan(StaticPlan):
    """A static plan defined on raster blocks: whole blocks are attended, so there is no token predicate.

    Args:
        block: tokens a query and a key block hold.
        visited: bool [visual_blocks, visual_blocks].
    """

    def __init__(self, method: str, config: Any, grid: TokenGrid, block: int, visited: Tensor) -> None:
        super().__init__(method, config, grid)
        self.block = block
        order = TokenOrder(grid, block)
        self._visited, self._mask = visited, blocks.from_map(visited, order, order)

    @functools.cached_property
    @building()
    def _blocks(self) -> BlockMask:
        """Kernels get the parts of blocks that are too large for them."""
        if self.block <= LARGEST_BLOCK or self.block & (self.block - 1):
            return self._mask
        order, parents = TokenOrder(self.grid, self.block).cut(LARGEST_BLOCK)
        parents = parents[: order.visual_blocks]
        return blocks.from_map(self._visited[parents][:, parents], order, order)

    @functools.cached_property
    @building()
    def pairs(self) -> int:
        valid = valid_tokens(self._mask.query_order).long()
        return int(valid @ self._visited.long() @ valid) + self.grid.dense_pairs

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return self._visited.to(query.device)[query // self.block, key // self.block]

    def raster_map(self) -> tuple[Tensor, int]:
        return self._visited, self.block

    def block_mask(
        self,
        block_q: int | None = None,
        block_k: int | None = None,
        order: Order | None = None,
        tile_q: Tile | None = None,
        tile_k: Tile | None = None,
    ) -> BlockMask:
        """The blocks attended. Only this plan's own block size in raster order exists."""
        if {block_q, block_k} - {None, self.block} or order not in (None, "raster") or tile_q or tile_k:
            raise DitAccelError(
                f"This {self.method} plan is defined on raster blocks of {self.block} x {self.block} tokens and has no "
                "other block mask. Leave the arguments out, or plan another block size."
            )
        return self._mask
