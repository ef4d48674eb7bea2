"""What SLA computes for some queries, from its definition; kernels are checked against it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.sla.call import EPSILON, apply_map, learned_inputs
from dit_accel.kernels.sla.reference import block_map
from dit_accel.plans.definition import RoutedDefinition, masked_attention
from dit_accel.plans.gate import gate_of, pool
from dit_accel.plans.plan import PlanCall


class SlaDefinition(RoutedDefinition):
    """SLA for some queries: softmax over their critical blocks plus the projected linear branch.

    The blocks are those that the router chose for this call; `flaw` checks them independently.
    """

    plan: Any

    def __init__(self, plan: Any, rows: Tensor, q: Tensor, k: Tensor, *others: Any) -> None:
        super().__init__(plan, rows, q, k, *others)
        lists = plan.classify(q, k, PlanCall(impl=self.impl, module=self.module))
        self.critical, self.negligible = (block_map(part, plan.key_order)[0] for part in lists)  # [H, queries, keys]
        self._lists = BlockLists.full(lists[0])

    def flaw(self) -> str | None:
        """A critical block with a lower score than another block, in fp64, among some blocks of queries."""
        queries, keys = self.plan.query_order, self.plan.key_order
        blocks = queries.visual_blocks
        some = torch.linspace(0, blocks - 1, min(16, blocks)).long().to(self.q.device)
        # terms of a mean and of a product, and of both sides of a gate
        gate = gate_of(self.module)
        depth = max(queries.block, keys.block) + self.q.shape[-1] * (1 if gate is None else 5)
        for head, critical in enumerate(self.critical):
            query = self.pooled(self.q[0, head].double(), queries)[0][some]
            key, _ = self.pooled(self.k[0, head].double(), keys)
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

    def attend(self, head: int, seen: Tensor, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        config, empty = self.plan.config, ~seen.any(-1, keepdim=True)
        out = masked_attention(q, k, v, seen | empty).masked_fill(empty, 0)
        if not weights:
            if config.topk:
                return out
            weights = tuple(weight.to(q) for weight in self.plan.untrained(q).parameters())
        linear = ~(self.critical | self.negligible)[head, self.blocks]
        if config.linear_scope == "all":
            linear = torch.ones_like(linear)
        visual, pairs = self.plan.grid.visual_rows, torch.zeros_like(seen)
        pairs[:, visual] = linear[:, self.plan.block_of(self.plan.key_order).to(q.device)]
        features = None
        if config.feature_map == "hedgehog":
            weight, bias = weights[2:4]
            own = min(head, weight.shape[1] - 1)  # heads may share the map
            features = weight[:, own : own + 1], bias[:, own : own + 1]
        inputs = learned_inputs(q[None, None], k[None, None], features)
        a, b = (apply_map(x[0, 0], config.feature_map) for x in inputs)
        affinity = a @ b.T * pairs
        branch = (affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON)
        return torch.where(self.are_visual, out + F.linear(branch, *weights[:2]), out)
