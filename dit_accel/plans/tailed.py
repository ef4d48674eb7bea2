"""Routed plans whose other blocks are not left out: each is one pseudo-key in the same softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.tail.api import with_tail
from dit_accel.plans.plan import PlanCall
from dit_accel.plans.routed import RoutedPlan
from dit_accel.plans.sampled import SampledCall, pooled


class TailedPlan(RoutedPlan):
    """A routed plan that attends to listed blocks exactly and to others by `kernels.tail`.

    Its settings have `tail`: "none", "mean" or "hybrid".
    """

    @property
    def has_tail(self) -> bool:
        return bool(self.config.tail != "none")

    @property
    def first_order(self) -> bool:
        """Whether the tail has PISA's first-order term."""
        return bool(self.config.tail == "hybrid")

    def dropped(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The blocks that are in no tail; arguments as of `choose`, result as in `with_tail`."""
        return None

    @torch.no_grad()
    def choose_for_tail(self, q: Tensor, k: Tensor, call: PlanCall) -> tuple[BlockLists, Tensor | None]:
        """What `choose` and `dropped` say of a call."""
        return self.choose(q, k, call), self.dropped(q, k)

    def attend_visual(self, q: Tensor, k: Tensor, v: Tensor, call: PlanCall) -> tuple[Tensor, BlockLists]:
        if not self.has_tail:
            return super().attend_visual(q, k, v, call)
        lists, dropped = self.choose_for_tail(q, k, call._replace(values=v))
        exact, lse = self.attend_listed(q, k, v, lists, call, lse=True)
        assert lse is not None
        out, _ = with_tail(
            q, k, v, exact, lse, lists, self.query_order, self.key_order, dropped=dropped,
            first_order=self.first_order, scale=call.scale, impl=call.impl,
        )  # fmt: skip
        return out, lists

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        parts = super().calls(learned)
        return parts | {"tail": (impls.TAIL, parts["attention"][1])} if self.has_tail else parts

    def needs(self, learned: bool) -> dict[str, Any]:
        return {"lse": self.has_tail}

    def in_tail(self, call: SampledCall, head: int) -> Tensor:
        """Whether a key block is in the tail of a query: bool [S, key blocks]."""
        assert call.lists is not None
        return ~self.listed(call.lists, head)[call.blocks(self.block_of(self.query_order))] & call.are_visual

    def reference(self, call: SampledCall, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Every block of the tail is one more key, with a bias."""
        seen = call.seen(head)
        if not self.has_tail:
            return masked_attention(q, k, v, seen)
        visual, block = self.grid.visual_rows, self.block_of(self.key_order).to(k.device)
        (keys, sizes), (values, _) = (pooled(x, self.key_order, block) for x in (k, v))
        bias = torch.cat([q.new_zeros(len(k)), sizes.log()])
        every, pairs = torch.cat([k, keys]), torch.cat([seen, self.in_tail(call, head)], -1)
        out = masked_attention(q, every, torch.cat([v, values]), pairs, bias)
        if self.first_order:
            of_tail = torch.cat([torch.zeros_like(v[:, :1]), torch.ones_like(values[:, :1])])
            matrix = (k[visual] - keys[block]).T @ v[visual]
            factor = q.shape[-1] ** -0.5 / self.grid.visual
            out = out + masked_attention(q, every, of_tail, pairs, bias) * (q @ matrix) * factor
        return out
