"""The model's own attention, untouched."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from dit_accel.plans.asked import Asked, Kind
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.plan import MaskPlan
from dit_accel.registry import Method
from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class Config:
    """Dense attention has no settings."""

    keeps_all: ClassVar[bool] = True


class DensePlan(MaskPlan):
    """Every token sees every token. `attend` is PyTorch's own attention unless another implementation is named."""

    def compute(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.impl != "auto" or asked.text_lens is not None:
            return super().compute(q, k, v, asked)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=asked.scale)

    def implementation(self, kind: Kind) -> tuple[str, str]:
        if kind.impl == "auto":
            return "scaled_dot_product_attention", "nothing is masked"
        return super().implementation(kind)


def make_plan(grid: TokenGrid, config: Config) -> DensePlan:
    t, h, w = (AxisTable.full(length) for length in grid.shape)
    return DensePlan("dense", config, grid, Mask((Product(t, h, w),)))


METHOD = Method("dense", Config, make_plan, "the model's own attention", source="-")
