"""A routed method as an outsider writes it, in one file: the nearest key blocks, more of them for larger queries."""

import dataclasses

import torch

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.method import Method, MethodConfig
from dit_accel.order import TokenOrder
from dit_accel.plans.routed import RoutedPlan


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Key blocks on either side of the query block: `reach`, and three times as many if its mean query is positive."""

    reach: int = 1
    block_q: int = 16
    block_k: int = 8


class NearestPlan(RoutedPlan):
    def __init__(self, config, grid):
        orders = (TokenOrder(grid, block) for block in (config.block_q, config.block_k))
        super().__init__("nearest", config, grid, *orders)

    def choose(self, q, k, call):
        order, config, grid = self.query_order, self.config, self.grid
        visual = q[:, :, grid.visual_start : grid.visual_start + grid.visual].mean(-1)
        padded = torch.nn.functional.pad(visual, (0, order.visual_blocks * order.block - grid.visual))
        reach = torch.where(padded.unflatten(-1, (-1, order.block)).sum(-1) > 0, 3 * config.reach, config.reach)
        rows = torch.arange(order.visual_blocks, device=q.device) * config.block_q // config.block_k
        columns = torch.arange(self.key_order.visual_blocks, device=q.device)
        listed = (rows[:, None] - columns).abs() <= reach[..., None]
        indices = listed.byte().sort(dim=-1, descending=True, stable=True).indices
        return BlockLists(indices.int(), listed.sum(-1, dtype=torch.int32))


METHOD = Method("nearest", Config, lambda grid, config: NearestPlan(config, grid), "nearest key blocks", "-", "tests")
