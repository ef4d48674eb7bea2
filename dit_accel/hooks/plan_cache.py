"""The plans of an accelerator, made once for each Config, token grid and device."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.plans import ramps
from dit_accel.plans.plan import Plan, building
from dit_accel.plans.routed import RoutedPlan
from dit_accel.registry import settings_of
from dit_accel.tokens import TokenGrid

GRIDS_KEPT = 16


class PlanCache:
    """The plans of a setting by grid, device and Config; beyond 16 grids and devices the oldest is dropped.

    Args:
        alone: all layers have the same settings. One layer among others may route to every block.
    """

    def __init__(self, method: Method, alone: bool = True) -> None:
        self._method, self._alone = method, alone
        self._plans: dict[tuple[TokenGrid, torch.device], dict[Any, Plan]] = {}
        self._densities: dict[TokenGrid, dict[Any, float | None]] = {}

    def get(self, config: Any, grid: TokenGrid, device: torch.device, place: float = 0.0) -> Plan:
        """The plan of a Config for a grid, ready to run on a device.

        Args:
            config: also a `Ramped`. The plan is that of a step which lies at `place`; both ends are made before.

        Raises:
            DitAccelError: the settings do not fit the grid, or keep every pair without saying so.
        """
        key = grid, device
        if key not in self._plans:
            if len(self._plans) >= GRIDS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = {}
        plans = self._plans[key]
        for needed in (*(ramps.ends(config) if isinstance(config, ramps.Ramped) else ()), ramps.at(config, place)):
            if needed not in plans:
                with building():
                    plan = self._method.plan(grid, needed)
                    self._refuse_full(plan)
                    self._densities.setdefault(grid, {})[needed] = plan.density
                plans[needed] = plan
        return plans[needed]

    @property
    def grids(self) -> list[TokenGrid]:
        """The grids of all plans so far, in order of appearance."""
        return list(self._densities)

    def density(self, config: Any, grid: TokenGrid) -> float | None:
        """The density of a Config's plan on a grid, of a ramp the mean of its ends; None if only calls tell it."""
        known = self._densities[grid]
        densities = [density for end in ramps.ends(config) if (density := known.get(end)) is not None]
        return statistics.mean(densities) if densities else None

    def _refuse_full(self, plan: Plan) -> None:
        routed = isinstance(plan, RoutedPlan)
        if plan.config.keeps_all or (routed and not self._alone):
            return
        least = plan.bounds[0] / plan.grid.tokens**2 if isinstance(plan, RoutedPlan) else plan.density
        assert least is not None, "a static plan has its density"
        if plan.config.share != "none":  # dense attention once in `refresh` steps
            least = (least if plan.config.share == "residual" else 0.0) + 1 / plan.config.refresh
        if least < 1:
            return
        counted = "" if plan.config.share == "none" else ", its dense steps counted,"
        settings = ", ".join(f"{key}={value!r}" for key, value in settings_of(plan.config).items())
        raise DitAccelError(
            f"{plan.method} with {settings} keeps every pair of tokens{counted} on the grid {plan.grid}, which is "
            "dense attention made slower. Choose tighter settings or smaller blocks, a larger picture or video, or "
            "'dense' to leave the model as it is."
        )
