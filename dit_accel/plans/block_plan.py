"""Plans of methods that are defined on whole blocks, such as the radial mask of the published code."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans import blocks
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.plan import Order, StaticPlan, among_others, building, check_token_mask, surround
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
    def pairs(self) -> int:
        valid = valid_tokens(self._mask.query_order).long()
        return int(valid @ self._visited.long() @ valid) + self.grid.dense_pairs

    def kept_keys(self, queries: Tensor, lists: BlockLists | None = None, head: int = 0) -> Tensor:
        visited = self._visited.to(queries.device)
        keys = torch.arange(self.grid.visual, device=queries.device)
        return among_others(visited[queries // self.block][:, keys // self.block], self.grid)

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

    @building()
    def token_mask(self) -> Tensor:
        check_token_mask(self.grid)
        tokens = self._visited.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return surround(tokens[: self.grid.visual, : self.grid.visual], self.grid)
