"""The plans of an accelerator, made once for each token grid and device."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.plans.plan import Plan, building
from dit_accel.plans.routed import RoutedPlan
from dit_accel.registry import settings_of
from dit_accel.tokens import TokenGrid

PLANS_KEPT = 16


class PlanCache:
    """The plans of one setting by grid and device; beyond 16 the oldest is dropped.

    Args:
        alone: all layers have this setting. One layer among others may route to every block.
    """

    def __init__(self, method: Method, config: Any, alone: bool = True) -> None:
        self._method, self._config, self._alone = method, config, alone
        self._plans: dict[tuple[TokenGrid, torch.device], Plan] = {}
        self.densities: dict[TokenGrid, float | None] = {}

    def get(self, grid: TokenGrid, device: torch.device) -> Plan:
        """The plan for a grid, ready to run on a device.

        Raises:
            DitAccelError: the settings do not fit the grid, or keep every pair without saying so.
        """
        key = grid, device
        if key not in self._plans:
            with building():
                plan = self._method.plan(grid, self._config)
                self._refuse_full(plan)
                self.densities[grid] = plan.density
            if len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return self._plans[key]

    def _refuse_full(self, plan: Plan) -> None:
        routed = isinstance(plan, RoutedPlan)
        if self._config.keeps_all or (routed and not self._alone):
            return
        least = plan.bounds[0] / plan.grid.tokens**2 if isinstance(plan, RoutedPlan) else plan.density
        assert least is not None, "a static plan has its density"
        if self._config.share != "none":  # dense attention once in `refresh` steps
            least = (least if self._config.share == "residual" else 0.0) + 1 / self._config.refresh
        if least < 1:
            return
        settings = ", ".join(f"{key}={value!r}" for key, value in settings_of(self._config).items())
        raise DitAccelError(
            f"{plan.method} with {settings} keeps every pair of tokens on the grid {plan.grid}, which is dense "
            "attention made slower. Choose tighter settings or smaller blocks, a larger picture or video, or 'dense' "
            "to leave the model as it is."
        )
