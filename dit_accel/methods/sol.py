"""Sol-Attn: key blocks whose score stands out of their row are attended exactly, all others as one pseudo-key each.

Query block i and key block j have the means q_i and k_j. Their score is s q_i . k_j, with the scale s of the logits.
Block j is exact for i if its score exceeds the row's mean score by `tau` standard deviations. So are the blocks next
to the query block, and the sinks. Every other block is in the tail (`kernels/tail/README.md`). Its mean key, with the
weight of its true number of tokens, and the sum of its values stand in the same softmax. Text and conditioning are
exact.

Sources: "Sol-Attn", arXiv 2607.24027; NVlabs/Sana, branch sol-engine. Tail "hybrid": PISA, arXiv 2602.01077.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.router.api import route
from dit_accel.kernels.router.rule import Rule, Variance
from dit_accel.method import Method
from dit_accel.methods.settings import TokenSettings
from dit_accel.plans.plan import PlanArguments, per_device
from dit_accel.plans.tailed import TailedPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

Tail = Literal["mean", "hybrid", "none"]


@dataclasses.dataclass(frozen=True)
class Config(TokenSettings):
    """Settings of Sol-Attn; the defaults are the published ones, but for blocks of 128 queries in place of 64.

    Args:
        tau: standard deviations above a row's mean score from which a key block is exact. Scores that are normally
            distributed keep a share of 1 - Phi(tau): 0.159 at 1, 0.067 at 1.5, 0.023 at 2.
        variance: of a row's scores: "diagonal" neglects the covariances of the coordinates of the mean keys, as
            published; "exact" does not.
        tail: what becomes of the other blocks. "mean": the tail; "hybrid": the tail with PISA's first-order term;
            "none": they are left out.
        sink: visual tokens from the start whose key blocks are exact for all queries; at least 0.
    """

    tau: float = option(1.0, ramps=True)
    variance: Variance = "diagonal"
    tail: Tail = "mean"
    sink: int = option(0, least=0)


class SolPlan(TailedPlan):
    """Sol-Attn on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("sol", config, grid, *config.cut(grid))

    @per_device
    def forced(self, device: torch.device) -> Tensor:
        """The blocks that are exact whatever their score: bool [query blocks, key blocks].

        Blocks next to a query block are those that hold one of its tokens, and those before and after each of them.
        """
        queries, keys = self.block_of(self.query_order), self.block_of(self.key_order)
        overlapping = torch.zeros(self.query_order.visual_blocks, self.key_order.visual_blocks, dtype=torch.bool)
        overlapping[queries, keys] = True
        forced = overlapping.clone()
        forced[:, 1:] |= overlapping[:, :-1]
        forced[:, :-1] |= overlapping[:, 1:]
        forced[:, keys[: self.config.sink]] = True
        return forced.to(device)

    def build(self, device: torch.device) -> None:
        super().build(device)
        self.forced(device)

    def choose(self, q: Tensor, k: Tensor, call: PlanArguments) -> BlockLists:
        rule = Rule(tau=float(self.config.tau), variance=self.config.variance, forced=self.forced(q.device))
        return route(q, k, self.query_order, self.key_order, rule, scale=call.scale, impl=call.impl)

    def always(self) -> tuple[int, Tensor]:
        return 1, self.forced(torch.device("cpu"))


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The tau at which normally distributed scores keep that share of the visual blocks, neighbours included."""
    forced = SolPlan(Config(), grid).forced(torch.device("cpu")).double().mean().item()
    share = min(max((grid.visual_share(density) - forced) / (1 - forced), 1e-9), 1 - 1e-9) if forced < 1 else 1 - 1e-9
    return {"tau": float(f"{statistics.NormalDist().inv_cdf(1 - share):.6g}")}


METHOD = Method(
    name="sol",
    config=Config,
    plan=lambda grid, config: SolPlan(config, grid),
    summary="key blocks that stand out exactly, all others as one pseudo-key each",
    source="Sol-Attn, arXiv 2607.24027; PISA, arXiv 2602.01077",
    good_for="keeping the picture without any training",
    at_density=at_density,
)
