"""FlexAttention as a peer: PyTorch's own compiled sparse attention with the same mask."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import flex_attention as flex

from dit_accel.bench.gate import Attend
from dit_accel.errors import DitAccelError
from dit_accel.plans.masks import Band, Product
from dit_accel.plans.plan import MaskPlan, Plan
from dit_accel.tokens import TokenGrid

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def flex_attention(plan: Plan, device: torch.device) -> Attend:
    """FlexAttention with the plan's mask, compiled; tokens stay in model order, which is all it knows.

    Raises:
        DitAccelError: the plan has no token mask that is known before the call.
        RuntimeError: it does not compile here.
    """
    if not isinstance(plan, MaskPlan):
        raise DitAccelError(f"FlexAttention takes a mask known before the call, and {plan.method} has none.")
    rule, tokens = mask_rule(plan, device), plan.grid.tokens
    torch.compiler.reset()  # after eight masks it would give up and run uncompiled
    make = torch.compile(flex.create_block_mask)
    blocks = make(lambda b, h, query, key: rule(query, key), None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def mask_rule(plan: MaskPlan, device: torch.device) -> Rule:
    """Whether a token sees a token, for broadcasting int indices in model order.

    Everything is looked up by token: arithmetic on the indices of a look-up is what the compiler fails on.
    """
    grid = plan.grid
    rules = [_rule(term, grid, device) for term in plan.mask.terms]
    around = _spread(torch.zeros(grid.visual, dtype=torch.bool), True, grid, device)
    return lambda query, key: functools.reduce(
        torch.logical_or, (rule(query, key) for rule in rules), around[query] | around[key]
    )


def _rule(term: Product | Band, grid: TokenGrid, device: torch.device) -> Rule:
    places = grid.coordinates()
    if isinstance(term, Band):
        position = _spread(places[:, 1] * grid.width + places[:, 2], 0, grid, device)
        frame, radius = _spread(places[:, 0], 0, grid, device), term.radius.to(device)
        return lambda query, key: (position[query] - position[key]).abs() < radius[frame[query], frame[key]]
    axes = []
    for place, table in zip(places.T, term.axes, strict=True):
        own, start, stop = (_spread(x, 0, grid, device) for x in (place, table.start[place], table.stop[place]))
        axes.append((own, start, stop, table.step))

    def inside(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = [
            (place[key] >= start[query]) & (place[key] < stop[query]) & ((place[key] - start[query]) % step == 0)
            for place, start, stop, step in axes
        ]
        return seen[0] & seen[1] & seen[2]

    return inside


def _spread(values: torch.Tensor, around: int | bool, grid: TokenGrid, device: torch.device) -> torch.Tensor:
    """Values of the visual tokens for all tokens: [tokens], `around` for text and reference."""
    every = torch.full((grid.tokens,), around, dtype=values.dtype)
    every[grid.visual_start : grid.visual_start + grid.visual] = values
    return every.to(device)
