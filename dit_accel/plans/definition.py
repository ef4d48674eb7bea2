"""A plan's result for some queries, computed from its method's definition; kernels are checked against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.plan import Impl, Plan
from dit_accel.plans.routed import RoutedPlan

# Keys of one product, as in a kernel that skips blocks. MKL's fp32 error depends on it: on gna's windows of 512 tokens
# it is 7.0e-7. Products with 8,192 columns have 3.4e-7.
RUN = 512


class Definition:
    """A plan's result for some queries of one call, head by head: softmax over the keys that the plan keeps.

    A method with another result declares its own class in `Method.definition`.

    Args:
        rows: int64 [S], the queries in model order, on the device of q.
        q, k, v: [1, H, N, D], of the call; v only for plans whose lists depend on it.
        impl, module: the implementation that routes, and the learned weights of the call.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Tensor,
        q: Tensor,
        k: Tensor,
        impl: Impl,
        module: nn.Module | None = None,
        v: Tensor | None = None,
    ) -> None:
        self.plan, self.rows, self.q, self.k, self.v, self.impl, self.module = plan, rows, q, k, v, impl, module
        self._static: Tensor | None = None
        self._lists: BlockLists | None = None

    def flaw(self) -> str | None:
        """The error in the pairs that the plan chose for this call; None if they are right."""
        return None

    def seen(self, head: int) -> Tensor:
        """The pairs attended exactly: bool [S, N]."""
        if self._static is not None:
            return self._static
        if self._lists is None:
            self._lists = self.plan.route(self.q, self.k, impl=self.impl, module=self.module, values=self.v)
        grid = self.plan.grid
        query = self.rows - grid.visual_start
        visual = (query >= 0) & (query < grid.visual)
        seen = torch.ones(len(query), grid.tokens, dtype=torch.bool, device=query.device)
        seen[visual] = self.plan.kept_keys(query[visual], self._lists, head)
        if self._lists is None and self.plan.head_share == 1:
            self._static = seen
        return seen

    def attend(self, head: int, seen: Tensor, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """The rows of one head, [S, D], in the dtype of q; differentiable.

        Args:
            seen: the result of `seen(head)`.
            q, k, v: the queries alone [S, D]; all keys and values [N, D].
            weights: the parameters of the layer's module.
        """
        return masked_attention(q, k, v, seen)


class RoutedDefinition(Definition):
    """For methods that treat visual queries and blocks of visual tokens in a way of their own."""

    plan: RoutedPlan

    @property
    def are_visual(self) -> Tensor:
        """Which of the queries are visual tokens: bool [S, 1]."""
        return ((self.rows >= self.plan.grid.visual_start) & (self.rows < self.plan.grid.conditioning_start))[:, None]

    @property
    def blocks(self) -> Tensor:
        """The query block of each query, any for one that is not visual: int64 [S]."""
        place = (self.rows - self.plan.grid.visual_start).clamp(0, self.plan.grid.visual - 1)
        return self.plan.block_of(self.plan.query_order).to(place.device)[place]

    def whole(self, head: int, q: Tensor) -> Tensor:
        """All queries of a head with some of them replaced by q [S, D], in its dtype: [N, D]."""
        return self.q[0, head].to(q).index_copy(0, self.rows, q)

    def pooled(self, x: Tensor, order: TokenOrder) -> tuple[Tensor, Tensor]:
        """Mean visual token of every block, and its tokens: [N, D] to [blocks, D], and [blocks] in the dtype of x."""
        wide, sizes = torch.promote_types(x.dtype, torch.float32), valid_tokens(order).to(x.device)
        block = self.plan.block_of(order).to(x.device)
        sums = x.new_zeros(len(sizes), x.shape[1], dtype=wide).index_add(
            0, block, x[self.plan.grid.visual_rows].to(wide)
        )
        return (sums / sizes[:, None]).to(x.dtype), sizes.to(x.dtype)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention over the pairs that `seen` [S, N] marks, in the inputs' dtype: [S, D] of q [S, D], k, v [N, D].

    Every row sees a key. `bias` [N] is added to the logits.
    """
    logits = torch.cat([q @ keys.T for keys in k.split(RUN)], -1) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    products = [part @ values for part, values in zip(weights.split(RUN, -1), v.split(RUN), strict=True)]
    return torch.stack(products).sum(0)
