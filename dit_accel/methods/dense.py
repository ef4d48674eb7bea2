"""The model's own attention, untouched."""

from __future__ import annotations

import dataclasses

from dit_accel.method import Method, MethodConfig
from dit_accel.plans.dense import DensePlan
from dit_accel.registry import DENSE


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Dense attention has no settings."""

    @property
    def keeps_all(self) -> bool:
        return True


METHOD = Method(
    DENSE,
    Config,
    lambda grid, config: DensePlan(DENSE, config, grid),
    "the model's own attention",
    source="-",
    good_for="the model's own attention, bit for bit",
    at_density=lambda grid, density: {},
    sparsest=lambda grid: 1.0,
)
