"""Routed plans whose other blocks are not left out: each is one pseudo-key in the same softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.tail.api import attend_with_tail, with_first_order
from dit_accel.kernels.tail.tokens import best_tokens, with_tokens
from dit_accel.plans.curves import along
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.routed import RoutedPlan
from dit_accel.plans.sampled import SampledQueries, pooled


class TailedPlan(RoutedPlan):
    """A routed plan that attends to listed blocks exactly and to others by `kernels.tail`.

    Its settings have `tail`: "none", "mean" or "hybrid".
    """

    @property
    def has_tail(self) -> bool:
        return bool(self.config.tail != "none")

    @property
    def extra_tokens(self) -> int:
        """Tokens that every query block attends to exactly besides its blocks."""
        return int(self.config.extra_tokens)

    @property
    def first_order(self) -> bool:
        """Whether the tail has PISA's first-order term."""
        return bool(self.config.tail == "hybrid")

    @property
    def heads_differ(self) -> bool:
        return self.config.budgets == "equal" and self.config.refresh == 1

    def dropped(self, q: Tensor, k: Tensor, call: PlanArguments) -> Tensor | None:
        """The blocks that are in no tail; arguments as of `choose`, result as in `with_tail`."""
        return None

    @torch.no_grad()
    def choose_for_tail(self, q: Tensor, k: Tensor, call: PlanArguments) -> tuple[BlockLists, Tensor | None]:
        """What `choose` and `dropped` say of a call."""
        return self.choose(q, k, call), self.dropped(q, k, call)

    def attend_visual(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> tuple[Tensor, BlockLists]:
        if not self.has_tail and not self.extra_tokens:
            return super().attend_visual(q, k, v, call)
        lists, dropped = self.choose_for_tail(q, k, call._replace(values=v))
        orders, share = (self.query_order, self.key_order), None
        if self.has_tail:
            out, before, share = attend_with_tail(
                q, k, v, lists, *orders, dropped=dropped, text_lens=call.text_lens, text_bias=call.text_bias,
                scale=call.scale, share=self.first_order, impl=call.impl,
            )  # fmt: skip
        else:
            out, lse = self.attend_listed(q, k, v, lists, call, lse=True)
            assert lse is not None
            before = lse
        if self.extra_tokens:
            tokens = best_tokens(q, k, lists, *orders, self.extra_tokens, call.scale)
            out, lse, single = with_tokens(
                q, k, v, out, before, tokens, *orders, pooled=self.has_tail, scale=call.scale
            )
            if share is not None:
                share = 1 - (1 - share) * torch.exp(before - lse) - torch.exp(single - lse)
        if share is not None:
            out = with_first_order(out, share, q, k, v, self.key_order, call.scale)
        return out, lists

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        parts = super().calls(learned)
        return parts | {"tail": (impls.TAIL, parts["attention"][1])} if self.has_tail else parts

    def needs(self, learned: bool) -> dict[str, Any]:
        return {"lse": self.has_tail or self.extra_tokens > 0}

    @torch.no_grad()
    def add_density(self, lists: BlockLists, density_sum: Tensor) -> None:
        super().add_density(lists, density_sum)
        if self.extra_tokens:
            queries, keys = self.block_sizes(lists.indices.device)
            left = self.grid.visual - torch.where(lists.used, keys[lists.indices.clamp(0, len(keys) - 1)], 0).sum(-1)
            single = (left.clamp(max=self.extra_tokens) * queries).sum(-1).mean()
            density_sum[0] += single / self.grid.tokens**2

    def _tokens(self, call: SampledQueries, head: int) -> Tensor:
        """The single tokens of a head's query blocks, by raster place: bool [query blocks, visual]."""
        q, k = (self.arrange(x[:, head : head + 1]) for x in (call.q, call.k))
        assert call.lists is not None
        lists = BlockLists(*(x[:, head : head + 1] for x in call.lists[:2]))
        tokens = best_tokens(q, k, lists, self.query_order, self.key_order, self.extra_tokens)[0, 0]
        marks = torch.zeros(len(tokens), self.grid.visual + 1, dtype=torch.bool, device=tokens.device)
        marks = marks.scatter_(1, torch.where(tokens < 0, self.grid.visual, tokens), True)[:, :-1]
        return marks if self.curve is None else marks[:, along(self.curve, self.grid.shape).argsort().to(marks.device)]

    def single_keys(self, call: SampledQueries, head: int) -> Tensor | None:
        if not self.extra_tokens:
            return None
        marks = call.once(f"single tokens of head {head}", lambda: self._tokens(call, head))
        single = torch.zeros(len(call.rows), self.grid.tokens, dtype=torch.bool, device=marks.device)
        single[:, self.grid.visual_rows] = marks[call.blocks(self.block_of(self.query_order))] & call.are_visual
        return single

    def tail_weights(self, call: SampledQueries, head: int, sizes: Tensor) -> Tensor:
        """The tokens that a block in the tail stands for, [S, key blocks], of `sizes` [key blocks]."""
        single = self.single_keys(call, head)
        if single is None:
            return sizes.expand(len(call.rows), -1)
        block = self.block_of(self.key_order).to(single.device)
        visual = single[:, self.grid.visual_rows].to(sizes)
        return sizes - sizes.new_zeros(len(single), len(sizes)).index_add(1, block, visual)

    def in_tail(self, call: SampledQueries, head: int) -> Tensor:
        """Whether a key block is in the tail of a query: bool [S, key blocks]."""
        assert call.lists is not None
        return ~self.listed(call.lists, head)[call.blocks(self.block_of(self.query_order))] & call.are_visual

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Every block of the tail is one more key, with a bias."""
        seen = call.seen(head)
        if not self.has_tail:
            return masked_attention(q, k, v, seen)
        visual, block = self.grid.visual_rows, self.block_of(self.key_order).to(k.device)
        (keys, sizes), (values, _) = (pooled(x, self.key_order, block) for x in (k, v))
        weights_of = self.tail_weights(call, head, sizes)
        bias = torch.cat([q.new_zeros(len(q), len(k)), weights_of.log()], -1)
        every, pairs = torch.cat([k, keys]), torch.cat([seen, self.in_tail(call, head) & (weights_of > 0)], -1)
        out = masked_attention(q, every, torch.cat([v, values]), pairs, bias)
        if self.first_order:
            of_tail = torch.cat([torch.zeros_like(v[:, :1]), torch.ones_like(values[:, :1])])
            matrix = (k[visual] - keys[block]).T @ v[visual]
            factor = q.shape[-1] ** -0.5 / self.grid.visual
            out = out + masked_attention(q, every, of_tail, pairs, bias) * (q @ matrix) * factor
        return out
