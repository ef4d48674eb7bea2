"""FlexAttention as a peer: PyTorch's own compiled sparse attention with the same mask."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.attention import flex_attention as flex

from dit_accel.errors import DitAccelError
from dit_accel.eval.bench_gate import Attend
from dit_accel.masks import AxisTable, Band, Mask, Product
from dit_accel.plans import MaskPlan, Plan


def flex_attention(plan: Plan, device: torch.device) -> Attend:
    """FlexAttention with the plan's mask, compiled; tokens stay in model order, which is all it knows.

    Raises:
        DitAccelError: the plan has no token mask that is known before the call.
    """
    if not isinstance(plan, MaskPlan):
        raise DitAccelError(f"FlexAttention takes a mask known before the call, and {plan.method} has none.")
    mask, grid = _on_device(plan.mask, device), plan.grid
    first, behind = grid.visual_start, grid.visual_start + grid.visual

    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visual = (query >= first) & (query < behind) & (key >= first) & (key < behind)
        inside = mask.allowed((query - first).clamp(0, grid.visual - 1), (key - first).clamp(0, grid.visual - 1))
        return inside | ~visual

    blocks = flex.create_block_mask(allowed, None, None, grid.tokens, grid.tokens, device=device, _compile=True)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def _on_device(mask: Mask, device: torch.device) -> Mask:
    def moved(term: Product | Band) -> Product | Band:
        if isinstance(term, Band):
            return dataclasses.replace(term, radius=term.radius.to(device))
        axes = (AxisTable(axis.start.to(device), axis.stop.to(device), axis.step) for axis in term.axes)
        return Product(*axes)

    return Mask(tuple(map(moved, mask.terms)))
