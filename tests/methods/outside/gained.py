"""A learned method as an outsider writes it, in one file: dense attention times a gain for each head.

Its own objective brings the mean square of each head's output to 1.
"""

import dataclasses

import torch
from torch import nn

from dit_accel.method import LearnedModule, Method, MethodConfig, Objective
from dit_accel.plans.dense import DensePlan
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """The gain that a head starts with."""

    start: float = option(1.0, above=0)

    @property
    def keeps_all(self):
        return True


class Gain(nn.Module):
    def __init__(self, heads, config):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, 1, 1), config.start))

    def forward(self, out):
        return out * self.weight.to(out)


class GainedPlan(DensePlan):
    def run(self, q, k, v, call):
        out = super().run(q, k, v, call)
        return out if call.module is None else call.module(out)


def squares(call):
    """The gains of a call, and the mean square of each head before them."""
    gains = call.module.weight
    return gains, (call.out / gains).square().mean((0, 2, 3))


METHOD = Method(
    "gained",
    Config,
    lambda grid, config: GainedPlan("gained", config, grid),
    summary="dense attention times a gain for each head",
    source="-",
    good_for="tests",
    module=LearnedModule("gain", lambda head_dim, heads, config: Gain(heads, config)),
    objectives=(
        Objective(
            "unit",
            trains="gains",
            record=squares,
            loss=lambda record: (record[0].flatten() ** 2 * record[1] - 1).square().mean(),
            alone=True,
        ),
    ),
)
