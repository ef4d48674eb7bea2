"""What SLA computes for some queries, from its definition; kernels are checked against it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dit_accel.kernels.sla.call import EPSILON, apply_map, learned_inputs
from dit_accel.kernels.sla.reference import block_map
from dit_accel.order import TokenOrder
from dit_accel.plans.definition import Definition, masked_attention
from dit_accel.plans.gate import gate_of, pool
from dit_accel.plans.plan import PlanCall


class SlaDefinition(Definition):
    """SLA for some queries: softmax over their critical blocks plus the projected linear branch.

    The blocks are those that the router chose for this call; `flaw` checks them independently.
    """

    plan: Any

    def __init__(self, plan: Any, rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *others: Any) -> None:
        super().__init__(plan, rows, q, k, *others)
        lists = plan.classify(q, k, PlanCall(impl=self.impl, module=self.module))
        self.critical, self.negligible = (block_map(part, plan.key_order)[0] for part in lists)  # [H, queries, keys]
        self.key_block = plan.key_order.block_of_token().to(q.device)
        blocks, block = plan.query_order.visual_blocks, plan.query_order.block_of_token().to(q.device)[rows]
        self.block, self.visual = block.clamp(max=blocks - 1), (block < blocks)[:, None]

    def flaw(self) -> str | None:
        """A critical block with a lower score than another block, in fp64, among some blocks of queries."""
        queries, keys = self.plan.query_order, self.plan.key_order
        blocks = queries.visual_blocks
        some = torch.linspace(0, blocks - 1, min(16, blocks)).long().to(self.q.device)
        # terms of a mean and of a product, and of both sides of a gate
        gate = gate_of(self.module)
        depth = max(queries.block, keys.block) + self.q.shape[-1] * (1 if gate is None else 5)
        for head, critical in enumerate(self.critical):
            query, key = _means(self.q[0, head], queries)[some], _means(self.k[0, head], keys)
            sizes, chosen = (query.abs(), key.abs()), critical[some]
            if self.plan.config.score == "learned" and gate is not None:
                key = pool(self.q, self.k.double(), queries, keys)[1][0, head]
                weights = gate.queries[head].double(), gate.keys[head].double()
                sizes = query.abs() @ weights[0].abs().T, key.abs() @ weights[1].abs().T
                query, key = query @ weights[0].T, key @ weights[1].T
            scores = query @ key.T
            slack = depth * torch.finfo(torch.float32).eps * (sizes[0] @ sizes[1].T).amax(-1)
            worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
            best = scores.masked_fill(chosen, -torch.inf).amax(-1)
            if not bool((worst >= best - slack).all()):
                return f"router: head {head} chose a critical block although another has a higher score"
        return None

    def seen(self, head: int) -> torch.Tensor:
        critical = F.pad(self.critical[head, self.block], (0, self.plan.key_order.dense_blocks), value=True)
        return critical[:, self.key_block] | ~self.visual

    def attend(
        self,
        head: int,
        seen: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        config, empty = self.plan.config, ~seen.any(-1, keepdim=True)
        out = masked_attention(q, k, v, seen | empty).masked_fill(empty, 0)
        if not weights:
            if config.topk:
                return out
            weights = tuple(weight.to(q) for weight in self.plan.untrained(q).parameters())
        linear = ~(self.critical | self.negligible)[head, self.block]
        if config.linear_scope == "all":
            linear = torch.ones_like(linear)
        pairs = F.pad(linear, (0, self.plan.key_order.dense_blocks), value=False)[:, self.key_block]
        features = None
        if config.feature_map == "hedgehog":
            weight, bias = weights[2:4]
            own = min(head, weight.shape[1] - 1)  # heads may share the map
            features = weight[:, own : own + 1], bias[:, own : own + 1]
        inputs = learned_inputs(q[None, None], k[None, None], features)
        a, b = (apply_map(x[0, 0], config.feature_map) for x in inputs)
        affinity = a @ b.T * pairs
        branch = (affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON)
        return torch.where(self.visual, out + F.linear(branch, *weights[:2]), out)


def _means(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """The mean of every visual block's tokens in fp64, [blocks, D]; x: [N, D]."""
    index = order.index()[: order.visual_blocks * order.block].to(x.device)
    held = (index >= 0).view(order.visual_blocks, order.block, 1)
    return (x.double()[index.clamp(min=0)].view(*held.shape[:2], -1) * held).sum(1) / held.sum(1)
