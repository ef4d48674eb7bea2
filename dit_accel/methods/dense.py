"""The model's own attention, untouched."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.plan import MaskPlan, PlanCall
from dit_accel.registry import Method
from dit_accel.tokens import TokenGrid

SDPA = "scaled_dot_product_attention"


@dataclasses.dataclass(frozen=True)
class Config:
    """Dense attention has no settings."""

    keeps_all: ClassVar[bool] = True


class DensePlan(MaskPlan):
    """Every token sees every token. `attend` is PyTorch's own attention unless another implementation is named."""

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanCall) -> torch.Tensor:
        if call.impl not in (AUTO, SDPA) or call.text_lens is not None:
            return super().run(q, k, v, call._replace(impl=AUTO) if call.impl == SDPA else call)
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=call.scale)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = "auto", *, learned: bool = False
    ) -> tuple[str, str]:
        if impl == AUTO:
            return SDPA, "nothing is masked"
        return super().prepare(device, dtype, head_dim, impl)


def make_plan(grid: TokenGrid, config: Config) -> DensePlan:
    t, h, w = (AxisTable.full(length) for length in grid.shape)
    return DensePlan("dense", config, grid, Mask((Product(t, h, w),)))


METHOD = Method(
    "dense",
    Config,
    make_plan,
    "the model's own attention",
    source="-",
    at_density=lambda grid, density: {},
    sparsest=lambda grid: 1.0,
)
