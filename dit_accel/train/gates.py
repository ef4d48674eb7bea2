"""What the objective `gate` compares: a layer's pooled queries and keys, and its pooled dense attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.hooks.selfcheck import AttentionCall
from dit_accel.plans.gate import BlockGate, divergence, gate_of, pool
from dit_accel.plans.routed import RoutedPlan


class GateSample(NamedTuple):
    """A call of a layer with a gate; the fields are arguments of `plans.gate.divergence`."""

    gate: BlockGate
    a: Tensor
    b: Tensor
    target: Tensor
    scale: float
    first: int

    def loss(self) -> Tensor:
        return divergence(*self)


def gate_sample(call: AttentionCall) -> GateSample | None:
    """What a call teaches its layer's gate; None without a gate. Nothing carries a gradient to the model."""
    gate, plan = gate_of(call.module), call.plan
    if gate is None or not isinstance(plan, RoutedPlan):
        return None
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    pooled = pool(plan.arrange(call.q), plan.arrange(call.k), plan.query_order, plan.key_order)
    return GateSample(gate, *pooled, pooled_map(call), scale, 0 if call.heads is None else call.heads[0])


@torch.no_grad()
def pooled_map(call: AttentionCall) -> Tensor:
    """T of `plans.gate`: [B, H, query blocks, key blocks], each row sums to 1.

    Dense attention is computed for a few queries at a time and pooled at once: never N x N.
    """
    plan, (batch, heads, *_), grid = call.plan, call.q.shape, call.plan.grid
    assert isinstance(plan, RoutedPlan)
    rows, columns = (plan.block_of(order).to(call.q.device) for order in (plan.query_order, plan.key_order))
    queries, blocks = torch.arange(grid.visual, device=call.q.device), plan.key_order.visual_blocks
    found = torch.zeros(
        batch, heads, plan.query_order.visual_blocks, blocks, device=call.q.device,
        dtype=torch.promote_types(call.q.dtype, torch.float32),
    )  # fmt: skip
    for b in range(batch):
        for h in range(heads):
            for chunk, weights in call.dense_weights(b, h, queries):
                visual = weights[:, grid.visual_rows]
                of_blocks = visual.new_zeros(len(chunk), blocks)
                of_blocks.scatter_reduce_(1, columns.expand_as(visual), visual, "amax")
                found[b, h].scatter_reduce_(0, rows[chunk, None].expand_as(of_blocks), of_blocks, "amax")
    return found / found.sum(-1, keepdim=True)
