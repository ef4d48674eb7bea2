"""What a plan computes for some queries, straight from its method's definition: what a kernel is checked against."""

from __future__ import annotations

import torch

from dit_accel.plans.plan import Impl, Plan
from dit_accel.plans.routed import RoutedPlan

# Keys of one product. MKL's fp32 errs half as much in products with 8,192 columns as in those with 512 (3.4e-7 and
# 7.0e-7 on gna's windows of 512 tokens), and a kernel that skips blocks has only the shorter ones.
RUN = 512


class Definition:
    """A plan's result for some queries of one call, head by head: here softmax over the keys that the plan keeps.

    A method that computes more than that declares its own in `Method.definition`.

    Args:
        plan: what is defined.
        rows: int64 [S], the queries in model order, on the device of q.
        q, k: [1, H, N, D], of the call.
        impl: who routes, if the plan routes by content.
    """

    def __init__(self, plan: Plan, rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, impl: Impl) -> None:
        self.plan, self.rows, self.q, self.k, self.impl = plan, rows, q, k, impl
        self._static: torch.Tensor | None = None

    def flaw(self) -> str | None:
        """What is wrong with the pairs that the plan chose for this call; None if they are right."""
        return None

    def seen(self, head: int) -> torch.Tensor:
        """The pairs attended exactly: bool [S, N]."""
        if self._static is not None:
            return self._static
        grid, one = self.plan.grid, slice(head, head + 1)
        query = self.rows - grid.visual_start
        visual = (query >= 0) & (query < grid.visual)
        seen = torch.ones(len(query), grid.tokens, dtype=torch.bool, device=query.device)
        seen[visual] = self.plan.kept_keys(query[visual], self.q[:, one], self.k[:, one])
        if not isinstance(self.plan, RoutedPlan):
            self._static = seen
        return seen

    def attend(
        self,
        head: int,
        seen: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """The rows of one head, [S, D], in the dtype of q; differentiable.

        Args:
            head: its index.
            seen: what `seen` gives for it.
            q: [S, D], the queries alone.
            k, v: [N, D].
            weights: the parameters of the layer's module, in their order.
        """
        return masked_attention(q, k, v, seen)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax attention over marked pairs, in the inputs' dtype: [S, D] of q [S, D] and k, v [N, D].

    Args:
        seen: bool [S, N]; every row sees a key.
    """
    logits = torch.cat([q @ keys.T for keys in k.split(RUN)], -1) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    products = [part @ values for part, values in zip(weights.split(RUN, -1), v.split(RUN), strict=True)]
    return torch.stack(products).sum(0)
