"""Plans that attend to everything."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from dit_accel.kernels.impls import AUTO, Choice, Impl
from dit_accel.kernels.obstacles import Facts
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.static import MaskPlan
from dit_accel.tokens import TokenGrid

SDPA = "scaled_dot_product_attention"


class DensePlan(MaskPlan):
    """Every token sees every token, by PyTorch's own attention unless another implementation is named."""

    def __init__(self, method: str, config: Any, grid: TokenGrid) -> None:
        t, h, w = (AxisTable.full(length) for length in grid.shape)
        super().__init__(method, config, grid, Mask((Product(t, h, w),)))

    @functools.cached_property
    def _masked(self) -> MaskPlan:
        """The same, by an implementation that knows lengths and biases of text."""
        return MaskPlan(self.method, self.config, self.grid, self.mask)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments) -> torch.Tensor:
        if call.impl not in (AUTO, SDPA) or call.text_lens is not None:
            return self._masked.run(q, k, v, call._replace(impl=AUTO) if call.impl == SDPA else call)
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=call.scale)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = "auto", *, learned: bool = False
    ) -> tuple[str, str]:
        if impl == AUTO:
            return SDPA, "nothing is masked"
        return super().prepare(device, dtype, head_dim, impl)

    def choices(self, facts: Facts, impl: Impl = AUTO, learned: bool = False) -> list[Choice]:
        if impl == AUTO:
            return [Choice("attention", "", SDPA, "nothing is masked")]
        return super().choices(facts, impl, learned)
