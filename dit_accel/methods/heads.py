"""Heads that are never computed: the others attend to everything, and the output of a skipped head is zero.

Source: the choice among heads of "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv:2410.11842), whose
output is the sum of g_i H^i W_O^i over heads. g_i is 1 or 0 here, chosen once for each layer by calibration. MoH's
router chooses for each token and needs training; it is not part of this method.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import in_autocast_dtype
from dit_accel.kernels.block_sparse.dense import zeros_spread
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.method import LossCalibration, Method, MethodConfig
from dit_accel.plans.dense import DensePlan
from dit_accel.plans.plan import PlanArguments, building
from dit_accel.plans.sampled import SampledQueries
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of heads.

    Args:
        keep: for each head of a layer 1 (computed) or 0 (skipped); "all": every head. Layers differ, so a layer
            schedule gives them; `dit-accel tune --calibrate SHARE --method heads` writes one.

    Raises:
        DitAccelError: `keep` has another form, or skips every head.
    """

    keep: Literal["all"] | tuple[int, ...] = option("all", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.keep):
            raise DitAccelError(f"keep skips every head of a layer; got {self.keep!r}. Keep at least one.")

    @property
    def head_share(self) -> float:
        """The share of the heads that are computed."""
        return 1.0 if isinstance(self.keep, str) else sum(self.keep) / len(self.keep)


class HeadsPlan(DensePlan):
    """Dense attention of some heads on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("heads", config, grid)
        self.head_share = config.head_share
        self._indices: dict[tuple[torch.device, int, int], Tensor] = {}

    @property
    def needs_whole(self) -> str | None:
        return "it leaves out heads of the whole sequence"

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs of a head, text included, as a mean over all heads."""
        return round(self.grid.tokens**2 * self.head_share)

    @property
    def density(self) -> float:
        return self.head_share

    def kept_keys(self, queries: Tensor, lists: BlockLists | None = None, head: int = 0) -> Tensor:
        keep = self.config.keep
        return super().kept_keys(queries) & (isinstance(keep, str) or bool(keep[head]))

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        computed = self._computed(q, call)
        if len(computed) == q.shape[1]:
            return super().run(q, k, v, call)
        q, k, v = in_autocast_dtype(q, k, v)
        out = zeros_spread(q)
        if not len(computed):  # under context parallelism
            return out
        q, k, v = (x.transpose(1, 2).index_select(2, computed).transpose(1, 2) for x in (q, k, v))
        return out.index_copy(1, computed, super().run(q, k, v, call))

    def _computed(self, q: Tensor, call: PlanArguments) -> Tensor:
        """The heads of a call that are computed: int64, on its device."""
        first, every = (0, q.shape[1]) if call.heads is None else call.heads
        keep = (1,) * every if isinstance(self.config.keep, str) else self.config.keep
        if len(keep) != every:
            raise DitAccelError(f"keep has {len(keep)} heads, but the layer has {every}; give 1 or 0 for each.")
        key = q.device, first, q.shape[1]
        if key not in self._indices:
            with building():
                flags = torch.tensor(keep[first : first + q.shape[1]])
                self._indices[key] = flags.nonzero().flatten().to(q.device)
        return self._indices[key]

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        keep = self.config.keep
        return super().reference(call, head, q, k, v) if isinstance(keep, str) or keep[head] else 0 * q


def ranked(heads: int, loss: Callable[[Config], float]) -> tuple[list[int], list[float]]:
    """The heads of a layer, the least missed first, and the losses of skipping the first, the first two and so on.

    First each head is skipped alone. Then heads are skipped together: they stand in for each other, so their losses do
    not add up.
    """
    alone = [loss(_without([head], heads)) for head in range(heads)]
    order = sorted(range(heads), key=alone.__getitem__)
    return order, [alone[order[0]], *(loss(_without(order[:count], heads)) for count in range(2, heads))]


def choices(record: tuple[list[int], list[float]], heads: int) -> list[tuple[Config, float, float]]:
    """Settings that skip one head of a layer or more, with the density and the loss of each; `record` of `ranked`."""
    order, losses = record
    return [(_without(order[:n], heads), 1 - n / heads, loss) for n, loss in enumerate(losses, 1)]


def _without(skipped: list[int], heads: int) -> Config:
    return Config(tuple(int(head not in skipped) for head in range(heads)))


METHOD = Method(
    "heads",
    Config,
    lambda grid, config: HeadsPlan(config, grid),
    "dense attention in some heads of each layer, zero in the others",
    source="the untrained part of MoH, arXiv:2410.11842",
    good_for="models whose heads matter unequally",
    calibration=LossCalibration("heads.json", ranked, lambda heads: 2 * heads - 2, choices),
)
