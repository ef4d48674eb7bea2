"""Some queries of one call, for plain PyTorch: what a plan's `reference` computes, and kernels are checked against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.impls import Impl
from dit_accel.order import TokenOrder, valid_tokens

if TYPE_CHECKING:
    from dit_accel.plans.plan import Plan


class SampledQueries:
    """The queries `rows` of a call of one sample, with all keys, and the pairs that the plan chose for this call.

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
        self._once: dict[str, Any] = {}

    @functools.cached_property
    def lists(self) -> BlockLists | None:
        """What the plan lists for the call; None if it does not look at q and k."""
        return self.plan.route(self.q, self.k, impl=self.impl, module=self.module, values=self.v)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once for all heads."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    def seen(self, head: int) -> Tensor:
        """The pairs attended exactly: bool [S, N]."""
        if self._static is not None:
            return self._static
        place, visual = self.rows - self.plan.grid.visual_start, self.are_visual[:, 0]
        seen = torch.ones(len(place), self.plan.grid.tokens, dtype=torch.bool, device=place.device)
        seen[visual] = self.plan.kept_keys(place[visual], self.lists, head)
        if (single := self.plan.single_keys(self, head)) is not None:
            seen |= single
        if self.lists is None and self.plan.head_share == 1:
            self._static = seen
        return seen

    @property
    def are_visual(self) -> Tensor:
        """Which of the queries are visual tokens: bool [S, 1]."""
        return ((self.rows >= self.plan.grid.visual_start) & (self.rows < self.plan.grid.conditioning_start))[:, None]

    def blocks(self, block_of_token: Tensor) -> Tensor:
        """The block of each query, any for one that is not visual: int64 [S], from that of all visual tokens."""
        place = (self.rows - self.plan.grid.visual_start).clamp(0, self.plan.grid.visual - 1)
        return block_of_token.to(place.device)[place]

    def whole(self, head: int, q: Tensor) -> Tensor:
        """All queries of a head with some of them replaced by q [S, D], in its dtype: [N, D]."""
        return self.q[0, head].to(q).index_copy(0, self.rows, q)


def pooled(x: Tensor, order: TokenOrder, block_of_token: Tensor) -> tuple[Tensor, Tensor]:
    """Mean visual token of every block, and its tokens: [N, D] to [blocks, D], and [blocks] in the dtype of x."""
    wide, sizes = torch.promote_types(x.dtype, torch.float32), valid_tokens(order).to(x.device)
    sums = x.new_zeros(len(sizes), x.shape[1], dtype=wide)
    sums = sums.index_add(0, block_of_token.to(x.device), x[order.grid.visual_rows].to(wide))
    return (sums / sizes[:, None]).to(x.dtype), sizes.to(x.dtype)
