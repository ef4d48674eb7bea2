"""Plans of methods that are defined on whole blocks, such as the radial mask of the published code."""

from __future__ import annotations

import functools
from typing import Any

import torch

from dit_accel.errors import DitAccelError
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

    def __init__(self, method: str, config: Any, grid: TokenGrid, block: int, visited: torch.Tensor) -> None:
        super().__init__(method, config, grid)
        self.block = block
        order = TokenOrder(grid, block)
        self._mask = blocks.from_map(visited, order, order)

    @functools.cached_property
    @building()
    def pairs(self) -> int:
        order = self._mask.query_order
        valid = valid_tokens(order).long()
        visual = self._mask.dense()[: order.visual_blocks, : order.visual_blocks].long()
        around = self.grid.tokens - self.grid.visual
        return int(valid @ visual @ valid) + around * (self.grid.tokens + self.grid.visual)

    def kept_keys(self, queries: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        order = self._mask.query_order
        visited = self._mask.dense()[: order.visual_blocks, : order.visual_blocks].to(queries.device)
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
                "other block mask; leave the arguments out, or plan another block size."
            )
        return self._mask

    @building()
    def token_mask(self) -> torch.Tensor:
        check_token_mask(self.grid)
        order = self._mask.query_order
        visual = self._mask.dense()[: order.visual_blocks, : order.visual_blocks]
        tokens = visual.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return surround(tokens[: self.grid.visual, : self.grid.visual], self.grid)
