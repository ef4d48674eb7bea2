"""Agent attention: a few agents, means of queries, gather from all keys and hand on to all queries. Experimental.

The visual grid is cut into tiles; the n agents A are the mean queries of the tiles. With the scale s of the logits

    O = softmax(t Q A^T) softmax(s A K^T) V + shortcut * V,    t = s ** exponent

for visual queries Q. K and V are all tokens, so text and conditioning reach visual queries through the agents. Text and
conditioning queries attend to everything by plain softmax attention. A model's bias on text is the tile's mean.

Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, and its training-free
use in Stable Diffusion (LeapLabTHU/Agent-Attention, agentsd), whose values are the defaults: an agent for 4 x 4 tokens,
`k_scale2` 0.3, `k_shortcut` 0.075. It runs in the first 20 of 50 steps: ``dense_last_steps=0.6`` here. Its agents merge
similar tokens (ToMe) within a tile, ours are means. Its merging of queries and keys, and the learned biases and
convolution of the trained form, are not part of this method.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.cuts import block_means, visual_of
from dit_accel.method import Method, MethodConfig
from dit_accel.order import TokenOrder
from dit_accel.plans.plan import BLOCK_K, BLOCK_Q, PlanArguments
from dit_accel.plans.routed import RoutedPlan, attend_all
from dit_accel.plans.sampled import SampledQueries, pooled
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of agent.

    Args:
        tile: frames, rows and columns of the tokens whose mean query is an agent.
        exponent: of the scale of the second softmax; 1 is the paper's equation, 0.3 is AgentSD's.
        shortcut: factor of V that is added to the output.
    """

    tile: tuple[int, int, int] = option((1, 4, 4), least=1)
    exponent: float = option(0.3, least=0)
    shortcut: float = 0.075


class AgentPlan(RoutedPlan):
    """Agent attention on one grid. No pair of visual tokens is attended exactly, so the lists of a call are empty."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("agent", config, grid, TokenOrder(grid, BLOCK_Q), TokenOrder(grid, BLOCK_K))
        t, h, w = map(min, config.tile, grid.shape)
        self.tiles = TokenOrder(grid, t * h * w, (t, h, w))

    def routing(self) -> None:
        return None

    @property
    def pairs(self) -> int:
        """Of agents with all keys, of visual queries with agents, and of other queries."""
        grid, agents = self.grid, self.tiles.visual_blocks
        return agents * (grid.tokens + grid.visual) + (grid.tokens - grid.visual) * grid.tokens

    @property
    def bounds(self) -> tuple[int, int]:
        return self.pairs, self.pairs

    def add_density(self, lists: BlockLists, density_sum: Tensor) -> None:
        density_sum += density_sum.new_tensor([self.pairs / self.grid.tokens**2, 1.0])

    def choose(self, q: Tensor, k: Tensor, call: PlanArguments) -> BlockLists:
        shape = (*q.shape[:2], self.query_order.visual_blocks, 0)
        return BlockLists.full(torch.empty(shape, dtype=torch.int32, device=q.device))

    def second_scale(self, scale: float) -> float:
        """The scale of the second softmax for that of the first."""
        return math.copysign(abs(scale) ** self.config.exponent, scale)

    def attend_visual(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> tuple[Tensor, BlockLists]:
        scale, tiles = q.shape[-1] ** -0.5 if call.scale is None else call.scale, self.tiles
        queries, bias = visual_of(q, self.grid), call.text_bias
        agents = block_means(queries, tiles).to(q.dtype)
        if bias is not None:
            bias = block_means(bias[:, None, self.grid.visual_rows, None], tiles)[:, 0, :, 0]
        call = call._replace(scale=scale, text_bias=bias)
        gathered = attend_all(agents, k, v, self.grid, call)
        call = PlanArguments(scale=self.second_scale(scale), impl=call.impl)
        out = attend_all(queries, agents, gathered, TokenGrid(1, 1, self.tiles.visual_blocks), call)
        return out + self.config.shortcut * visual_of(v, self.grid), self.choose(q, k, call)

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Both softmaxes for visual queries; agents are means over all queries of the call."""
        agents, _ = pooled(call.whole(head, q), self.tiles, self.block_of(self.tiles))
        every, scale = torch.ones(1, len(k), dtype=torch.bool, device=k.device), q.shape[-1] ** -0.5
        gathered = masked_attention(agents, k, v, every)
        out = masked_attention(q, agents, gathered, every[:, : len(agents)], scale=self.second_scale(scale))
        skipped = self.config.shortcut * v[call.rows]
        return torch.where(call.are_visual, out + skipped, masked_attention(q, k, v, every))


NOTE = (
    "agent is experimental: its relative error is 0.1 to 0.8 in the layers of the embedded model "
    "(docs/methods/heads.md); verify='first-call' measures it here"
)
METHOD = Method(
    "agent",
    Config,
    lambda grid, config: AgentPlan(config, grid),
    "a few pooled queries stand between queries and keys, with a softmax on each side",
    source="Agent attention, arXiv 2312.08874; LeapLabTHU/Agent-Attention",
    good_for="comparisons with its paper",
    experimental=True,
    note=NOTE,
)
