"""The model's own attention, untouched."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dit_accel.plans.dense import DensePlan
from dit_accel.registry import Method


@dataclasses.dataclass(frozen=True)
class Config:
    """Dense attention has no settings."""

    keeps_all: ClassVar[bool] = True


METHOD = Method(
    "dense",
    Config,
    lambda grid, config: DensePlan("dense", config, grid),
    "the model's own attention",
    source="-",
    at_density=lambda grid, density: {},
    sparsest=lambda grid: 1.0,
)
