"""The plans of an accelerator, made once for each token grid and device."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.plans.plan import Plan, building
from dit_accel.registry import Method, settings_of
from dit_accel.tokens import TokenGrid

PLANS_KEPT = 16


class PlanCache:
    """The plans of one setting by grid and device; beyond 16 the oldest is dropped."""

    def __init__(self, method: Method, config: Any) -> None:
        self._method, self._config = method, config
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
        # settings of a routed method have no `keeps_all`
        if getattr(self._config, "keeps_all", True) or plan.pairs is None or plan.pairs < plan.grid.tokens**2:
            return
        settings = ", ".join(f"{key}={value!r}" for key, value in settings_of(self._config).items())
        raise DitAccelError(
            f"{plan.method} with {settings} keeps every pair of tokens on the grid {plan.grid}, which is dense "
            "attention made slower. Choose tighter settings, a larger video, 'dense' to leave the model as it is, or "
            "gna with window='full' to test the kernel."
        )
