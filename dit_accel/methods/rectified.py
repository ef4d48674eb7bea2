"""Rectified SpaAttn: the best key blocks exactly, and others by their means where a mean may stand for its tokens.

A query block ranks the visual key blocks by the softmax of its mean query over their mean keys. It attends exactly to
the best ``1 - drop`` of them and to as many as hold `topp` of the softmax. It always attends to the blocks around its
own tokens. Others are compensated if their score exceeds what the deviations of their tokens could change
(`kernels.tail.rectified`). The rest is left out. Text and conditioning are exact.

Compensation "exact" puts blocks into the softmax as pseudo-keys, as in `sol`. "published" scales the exact part by the
pooled share of what is not compensated, and adds the pooled shares times the mean values.

Source: "Rectified SpaAttn", arXiv 2511.19835, and its code. Tokens lie along a generalised Hilbert curve there, in
blocks of 128. ``drop`` is 0.8 for HunyuanVideo, 0.75 for Wan 2.1, 0.85 for Wan 2.2 and 0.9 for FLUX in 4096 x 4096.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.router.api import route
from dit_accel.kernels.router.rule import Rule
from dit_accel.kernels.tail.rectified import compensated, trusted
from dit_accel.method import Method
from dit_accel.methods.settings import BlockSettings
from dit_accel.plans.plan import PlanArguments, per_device
from dit_accel.plans.routed import Ordering
from dit_accel.plans.sampled import SampledQueries, pooled
from dit_accel.plans.tailed import TailedPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

Compensation = Literal["exact", "published"]
# Shares such as 1 - 0.8 lie a little below their decimal value in binary.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Config(BlockSettings):
    """Settings of Rectified SpaAttn.

    Args:
        drop: share of the visual key blocks that are not among the best, in [0, 1]: of K blocks ``int((1 - drop) * K)``
            are kept by number.
        topp: share of the softmax over a row's block scores that kept blocks hold at least, in [0, 1].
        gate: compensate only blocks that are trusted; False: all.
        compensation: "exact": by the log-sum-exp of every row; "published": by pooled shares, one a query block.
    """

    drop: float = option(0.8, least=0, most=1, ramps=True)
    topp: float = option(0.3, least=0, most=1, ramps=True)
    gate: bool = True
    compensation: Compensation = "exact"
    order: Ordering = "hilbert"

    @property
    def tail(self) -> str:
        return "mean" if self.compensation == "exact" else "none"

    @property
    def keeps_all(self) -> bool:
        return self.drop == 0

    def counts(self, blocks: int) -> int:
        """Blocks that every row keeps by number, of so many visual key blocks."""
        return int((1 - self.drop) * blocks + _ROUNDING)


class RectifiedPlan(TailedPlan):
    """Rectified SpaAttn on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("rectified", config, grid, *config.cut(grid))

    @per_device
    def around(self, device: torch.device) -> Tensor:
        """Key blocks with a token of a query block or one of the 26 around it: bool [query blocks, key blocks]."""
        orders = self.query_order, self.key_order
        queries, keys = (self.block_of(order).view(self.grid.shape) for order in orders)
        near = torch.zeros(*(order.visual_blocks for order in orders), dtype=torch.bool)
        for steps in itertools.product((-1, 0, 1), repeat=3):
            here, there = (tuple(slice(max(0, sign * n), min(0, sign * n) or None) for n in steps) for sign in (-1, 1))
            near[queries[here].flatten(), keys[there].flatten()] = True
        return near.to(device)

    def build(self, device: torch.device) -> None:
        super().build(device)
        self.around(device)

    def choose(self, q: Tensor, k: Tensor, call: PlanArguments) -> BlockLists:
        config, blocks = self.config, self.key_order.visual_blocks
        rule = Rule(topk=config.counts(blocks), topp=float(config.topp), forced=self.around(q.device))
        return route(q, k, self.query_order, self.key_order, rule, scale=call.scale, impl=call.impl)

    def always(self) -> tuple[int, Tensor]:
        return max(1, self.config.counts(self.key_order.visual_blocks)), self.around(torch.device("cpu"))

    def dropped(self, q: Tensor, k: Tensor, call: PlanArguments) -> Tensor | None:
        orders = self.query_order, self.key_order
        return ~trusted(q, k, *orders, impl=call.impl) if self.config.gate else None

    def attend_visual(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> tuple[Tensor, BlockLists]:
        if self.has_tail:
            return super().attend_visual(q, k, v, call)
        if call.text_bias is not None:
            raise DitAccelError(
                "compensation='published' takes text that is a key or is none; this model weighs its text. Use "
                "compensation='exact'."
            )
        lists, dropped = self.choose_for_tail(q, k, call)
        exact, _ = self.attend_listed(q, k, v, lists, call)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        orders = self.query_order, self.key_order
        return compensated(q, k, v, exact, lists, dropped, *orders, call.text_lens, scale), lists

    def in_tail(self, call: SampledQueries, head: int) -> Tensor:
        tail = super().in_tail(call, head)
        if not self.config.gate:
            return tail
        q, k = (self.arrange(x[:, head : head + 1]) for x in (call.q, call.k))
        blocks = call.blocks(self.block_of(self.query_order))
        return tail & trusted(q, k, self.query_order, self.key_order)[0, 0][blocks]

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        out = super().reference(call, head, q, k, v)
        if self.has_tail:
            return out
        # pooled shares come from all queries of a block, so the gradient of q reaches the sampled ones alone
        scale, visual, row = q.shape[-1] ** -0.5, self.grid.visual_rows, self.block_of(self.query_order)
        means, _ = pooled(call.whole(head, q), self.query_order, row)
        (keys, sizes), (values, _) = (pooled(x, self.key_order, self.block_of(self.key_order)) for x in (k, v))
        others = torch.cat([k[: visual.start], k[visual.stop :]])
        logits = torch.cat([means @ keys.T * scale + sizes.log(), means @ others.T * scale], -1)
        shares = logits.softmax(-1)[call.blocks(row), : len(keys)] * self.in_tail(call, head)
        return torch.where(call.are_visual, (1 - shares.sum(-1, keepdim=True)) * out + shares @ values, out)


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The share of visual blocks by number alone, to six digits; neighbours besides."""
    return {"drop": float(f"{1 - min(1.0, grid.visual_share(density)):.6g}"), "topp": 0.0}


METHOD = Method(
    name="rectified",
    config=Config,
    plan=lambda grid, config: RectifiedPlan(config, grid),
    summary="the best key blocks exactly, others by their means where that is safe",
    source="Rectified SpaAttn, arXiv 2511.19835",
    good_for="a known number of exact blocks, without training",
    at_density=at_density,
)
