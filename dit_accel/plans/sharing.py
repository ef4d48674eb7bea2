"""Static plans whose layers share results between denoising steps.

Every `refresh` steps a layer computes dense attention; that is its output. At the steps between:

- share "residual": masked attention plus the residual, which is dense minus masked attention of the refresh;
- share "output": the output of the refresh. Nothing is computed ("skip").

A guidance branch has results of its own. A new run, another plan or another shape refreshes. Outside of a transformer
nothing tells the step: attention is the masked one.

Source: DiTFastAttn, arXiv:2406.08552: window attention with residual sharing, and attention sharing across timesteps.
The paper chooses for each step and layer; here a layer's settings hold for a run.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.impls import AUTO
from dit_accel.plans.dense import DensePlan
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.static import MaskPlan

Share = Literal["none", "residual", "output"]


class StoredResult(NamedTuple):
    """What a layer's calls keep: its plan, the step, and the residual or output [B, H, N, D]."""

    owner: Any
    step: int
    result: Tensor


class SharingPlan(MaskPlan):
    """A mask whose layers share results as its settings say."""

    @functools.cached_property
    def _dense(self) -> DensePlan:
        return DensePlan(self.method, self.config, self.grid)

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        config, memory = self.config, call.memory
        if config.share == "none" or (memory is None and config.refresh > 1):
            return super().run(q, k, v, call)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise DitAccelError(
                f"share={config.share!r} takes results from earlier denoising steps, which have no gradients. Train "
                "with share='none'."
            )
        earlier = None if memory is None else memory.stored.pop(memory.number, None)
        if memory is not None and earlier is not None and self._fits(earlier, q, memory.step):
            if not memory.last:
                memory.stored[memory.number] = earlier
            if config.share == "output":
                out, density = earlier.result.clone(), 0.0
            else:
                out, density = super().run(q, k, v, call) + earlier.result, self.density
        else:
            out, density = self._dense.run(q, k, v, call._replace(impl=AUTO)), 1.0
            if memory is not None and not memory.last:
                if config.share == "output":
                    result = out.clone()
                else:
                    result, density = out - super().run(q, k, v, call), 1 + self.density
                memory.stored[memory.number] = StoredResult(self, memory.step, result)
        if call.density_sum is not None:
            call.density_sum[0] += density
            call.density_sum[1] += 1
        return out

    def _fits(self, earlier: StoredResult, q: Tensor, step: int) -> bool:
        same = (earlier.result.shape, earlier.result.device) == (q.shape, q.device)
        return earlier.owner is self and same and 0 < step - earlier.step < self.config.refresh
