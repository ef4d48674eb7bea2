"""The gate before any timing: some queries of the full shape, computed exactly, against what the kernel made of them.

Every method is held against its definition in fp64: static ones against their token mask, SLA against softmax over the
routed blocks plus the linear branch. Gradients need no smaller shape: of a loss over the sampled queries alone, dk and
dv are exact sums over these queries, and every key takes part in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import Impl
from dit_accel.kernels.sla.api import route
from dit_accel.kernels.sla.features import EPSILON, apply_map
from dit_accel.methods.sla import SlaPlan, SparseLinearAttention
from dit_accel.order import TokenOrder
from dit_accel.plans.block_plan import BlockPlan
from dit_accel.plans.plan import MaskPlan, Plan
from dit_accel.tokens import TokenGrid

# Pairs of a head that are computed exactly: a few hundred queries of a long video, 1,024 of 8,192 tokens. The largest
# of few errors says little: over 128 queries plain PyTorch's own varied by a factor of three from sample to sample.
PAIRS = 1 << 23
# Keys of one product. MKL's fp32 errs half as much in products with 8,192 columns as in those with 512 (3.4e-7 and
# 7.0e-7 on gna's windows of 512 tokens), and a kernel that skips blocks has none of the former.
RUN = 512
OTHERS = 8  # one query in so many is a text or reference token, if there are that many
NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Inexact(Exception):
    """A result is further from the truth than it may be, so no time of it counts."""


class Check(NamedTuple):
    """Largest error of a tensor against fp64, and the largest that it may be."""

    error: float
    budget: float

    @property
    def green(self) -> bool:
        return self.error <= self.budget  # not so if the error is NaN


@dataclasses.dataclass
class Problem:
    """One call: tensors [1, H, N, D] as a model hands them over, the plan, who computes, and the module for SLA."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    plan: Plan
    impl: Impl
    module: SparseLinearAttention | None = None

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """The module's learned weights; gradients are taken for them too."""
        return () if self.module is None else (self.module.proj.weight, self.module.proj.bias)


def check(problem: Problem, attend: Attend, *, gradients: bool) -> dict[str, Check]:
    """Hold `attend` against fp64 on sampled queries, all heads.

    An error may be at most twice that of plain PyTorch in the same dtype, plus one rounding of the largest term: the
    rule of `testing.error_budget`, with the largest errors taken over heads.

    Args:
        problem: the call.
        attend: what is to be timed, (q, k, v) to the output.
        gradients: also check the gradients of q, k, v and of the module's weights.

    Returns:
        A check for each tensor by name.

    Raises:
        Inexact: one of them is red; the message names it.
    """
    rows = sample(problem.plan.grid).to(problem.q.device)
    got = _results(problem, attend, rows, gradients=gradients)
    errors, plains, sizes = (dict.fromkeys(got, 0.0) for _ in range(3))
    weights: dict[str, list[torch.Tensor]] = {name: [] for name in got if name in ("dweight", "dbias")}
    for head, seen in enumerate(_heads(problem, rows)):
        exact = _head(problem, head, rows, seen, torch.float64, gradients=gradients)
        plain = _head(problem, head, rows, seen, problem.q.dtype, gradients=gradients)
        size = {name: value.abs() for name, value in exact.items()}
        if gradients:
            for name, value in _magnitudes(problem, head, rows, seen.exact).items():
                size[name] = size[name] + value
        for name in got:
            if name in weights:  # summed over heads
                weights[name].append(torch.stack([exact[name], plain[name].double(), size[name]]))
                continue
            truth = exact[name]
            errors[name] = _worst(errors[name], got[name][head].double() - truth)
            plains[name] = _worst(plains[name], plain[name].double() - truth)
            sizes[name] = _worst(sizes[name], size[name])
    for name, parts in weights.items():
        truth, near, size_ = torch.stack(parts).sum(0)
        errors[name] = _worst(0.0, got[name].double() - truth)
        plains[name], sizes[name] = _worst(0.0, near - truth), _worst(0.0, size_)
    epsilon = torch.finfo(problem.q.dtype).eps
    checks = {name: Check(errors[name], 2 * plains[name] + epsilon * sizes[name]) for name in got}
    for name, found in checks.items():
        if not found.green:
            raise Inexact(f"{name}: error {found.error:.3g}, at most {found.budget:.3g} allowed")
    return checks


def sample(grid: TokenGrid) -> torch.Tensor:
    """Queries to look at, in model order: spread over the visual tokens and over the others, with the ends of both."""
    count = min(grid.tokens, max(OTHERS, PAIRS // grid.tokens))
    tokens = torch.arange(grid.tokens)
    visual = (tokens >= grid.visual_start) & (tokens < grid.visual_start + grid.visual)
    some = [_spaced(tokens[visual], count), _spaced(tokens[~visual], count // OTHERS)]
    return torch.cat(some).sort().values


def _spaced(tokens: torch.Tensor, count: int) -> torch.Tensor:
    count = min(count, len(tokens))
    return (
        tokens[torch.linspace(0, len(tokens) - 1, count, dtype=torch.float64).round().long()] if count else tokens[:0]
    )


def seen_keys(plan: Plan, rows: torch.Tensor) -> torch.Tensor:
    """Which tokens the queries `rows` see under a static plan: bool [rows, tokens], model order.

    Raises:
        DitAccelError: the plan is of a kind whose definition is not known here.
    """
    grid = plan.grid
    seen = torch.ones(len(rows), grid.tokens, dtype=torch.bool, device=rows.device)
    visual = slice(grid.visual_start, grid.visual_start + grid.visual)
    query = rows - grid.visual_start
    inside = (query >= 0) & (query < grid.visual)
    query, key = query[inside, None], torch.arange(grid.visual, device=rows.device)
    if isinstance(plan, MaskPlan):
        seen[inside, visual] = plan.mask.allowed(query, key)
    elif isinstance(plan, BlockPlan):
        seen[inside, visual] = plan.block_mask().dense().to(rows.device)[query // plan.block, key // plan.block]
    else:
        raise DitAccelError(f"There is no exact result to hold {plan.method} against, so it is not timed.")
    return seen


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of one head by its definition, in the inputs' dtype: [rows, D] of q [rows, D] and k, v [tokens, D].

    Args:
        seen: bool [rows, tokens]; every row sees a key.
    """
    logits = torch.cat([q @ keys.T for keys in k.split(RUN)], -1) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    products = [part @ values for part, values in zip(weights.split(RUN, -1), v.split(RUN), strict=True)]
    return torch.stack(products).sum(0)


def check_routing(problem: Problem, critical: torch.Tensor) -> None:
    """Hold the router's choice against fp64 means and products for some blocks of queries, all heads.

    Args:
        critical: the kept blocks, [1, H, visual_blocks, kept].

    Raises:
        Inexact: a block was kept although its score is below that of one left out by more than fp32 rounding.
    """
    order = _sla(problem.plan).order
    some = torch.linspace(0, order.visual_blocks - 1, min(16, order.visual_blocks)).long().to(critical.device)
    index = order.index()[: order.visual_blocks * order.block].to(critical.device)
    held = (index >= 0).view(order.visual_blocks, order.block, 1)

    def means(x: torch.Tensor) -> torch.Tensor:
        blocks = x.double()[index.clamp(min=0)].view(*held.shape[:2], -1) * held
        return blocks.sum(1) / held.sum(1)

    depth = order.block + problem.q.shape[-1]  # terms of a mean and of a product
    for head in range(problem.q.shape[1]):
        query, key = means(problem.q[0, head])[some], means(problem.k[0, head])
        scores, kept = query @ key.T, _marked(critical[0, head, some], order.visual_blocks)
        slack = depth * torch.finfo(torch.float32).eps * (query.abs() @ key.abs().T).amax(-1)
        worst = scores.masked_fill(~kept, torch.inf).amin(-1)
        best = scores.masked_fill(kept, -torch.inf).amax(-1)
        if not bool((worst >= best - slack).all()):
            raise Inexact(f"router: head {head} kept a block although a better one was left out")


class _Seen(NamedTuple):
    """Pairs of one head: bool [rows, tokens]. SLA also has `linear` pairs, for the `visual` rows [rows, 1]."""

    exact: torch.Tensor
    linear: torch.Tensor | None = None
    visual: torch.Tensor | None = None


def _heads(problem: Problem, rows: torch.Tensor) -> Iterator[_Seen]:
    """What the rows see, head by head.

    Raises:
        Inexact: the router of SLA has not kept the best blocks.
    """
    if problem.module is None:
        seen = _Seen(seen_keys(problem.plan, rows))
        yield from (seen for _ in range(problem.q.shape[1]))
        return
    plan = _sla(problem.plan)
    blocks, around = plan.order.visual_blocks, plan.order.dense_blocks
    lists = route(problem.q, problem.k, plan.order, plan.config.kept(blocks), plan.config.dropped(blocks), problem.impl)
    check_routing(problem, lists[0])
    block_of = _block_of_token(plan.order).to(rows.device)
    visual = (block_of < blocks)[rows, None]
    block = block_of[rows].clamp(max=blocks - 1)
    for head in range(problem.q.shape[1]):
        critical, skipped = (_marked(part[0, head, block], blocks) for part in lists)
        linear = torch.ones_like(critical) if plan.config.linear_scope == "all" else ~(critical | skipped)
        exact = F.pad(critical, (0, around), value=True)[:, block_of] | ~visual
        yield _Seen(exact, F.pad(linear, (0, around), value=False)[:, block_of], visual)


def _sla(plan: Plan) -> SlaPlan:
    assert isinstance(plan, SlaPlan)
    return plan


def _marked(lists: torch.Tensor, blocks: int) -> torch.Tensor:
    """Lists of blocks [rows, listed] as a map: bool [rows, blocks]."""
    return torch.zeros(len(lists), blocks, dtype=torch.bool, device=lists.device).scatter_(-1, lists.long(), True)


def _block_of_token(order: TokenOrder) -> torch.Tensor:
    tokens = order.index()
    slots = (tokens >= 0).nonzero().squeeze(1)
    block_of = torch.empty(order.grid.tokens, dtype=torch.int64)
    block_of[tokens[slots]] = slots // order.block
    return block_of


def _results(problem: Problem, attend: Attend, rows: torch.Tensor, *, gradients: bool) -> dict[str, torch.Tensor]:
    """What the call makes: the rows [H, R, D] of the output, and gradients, those of q for the rows."""
    if not gradients:
        with torch.no_grad():
            return {"out": attend(problem.q, problem.k, problem.v)[0, :, rows]}
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out = attend(q, k, v)
    only = torch.zeros_like(problem.grad)
    only[:, :, rows] = problem.grad[:, :, rows]
    found = torch.autograd.grad(out, (q, k, v, *problem.weights), only)
    results = dict(zip(NAMES, (out.detach(), *found)))  # noqa: B905 (the last two belong to a module)
    return {
        name: value[0, :, rows] if name in ("out", "dq") else value[0] if name in ("dk", "dv") else value
        for name, value in results.items()
    }


def _head(
    problem: Problem, head: int, rows: torch.Tensor, seen: _Seen, dtype: torch.dtype, *, gradients: bool
) -> dict[str, torch.Tensor]:
    """One head's rows by definition, in a dtype: the output [R, D], and gradients by name."""
    tensors = [problem.q[0, head, rows], problem.k[0, head], problem.v[0, head], *problem.weights]
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in tensors]
    q, k, v, *weights = leaves
    with torch.set_grad_enabled(gradients):
        out = masked_attention(q, k, v, seen.exact)
        if problem.module is not None:
            assert seen.linear is not None and seen.visual is not None
            feature_map = problem.module.config.feature_map
            affinity = apply_map(q, feature_map) @ apply_map(k, feature_map).T * seen.linear
            linear = (affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON)
            out = torch.where(seen.visual, out + F.linear(linear, *weights), out)
    if not gradients:
        return {"out": out}
    found = torch.autograd.grad(out, leaves, problem.grad[0, head, rows].to(dtype))
    return dict(zip(NAMES, (out.detach(), *found)))  # noqa: B905 (the last two belong to a module)


def _magnitudes(problem: Problem, head: int, rows: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Size of the terms of dq and dk, which cancel: p * (abs(dp) + abs(delta)) times abs(k) or abs(q)."""
    q, k, v = (x[0, head].double() for x in (problem.q, problem.k, problem.v))
    q, gradient, scale = q[rows], problem.grad[0, head, rows].double(), problem.q.shape[-1] ** -0.5
    weights = (q @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    delta = (gradient.abs() * (weights @ v).abs()).sum(-1, keepdim=True)
    terms = weights * (gradient.abs() @ v.abs().T + delta) * scale
    return {"dq": terms @ k.abs(), "dk": terms.T @ q.abs()}


def _worst(so_far: float, values: torch.Tensor) -> float:
    """The largest magnitude up to now; NaN stays."""
    new = values.abs().max().item()
    return new if math.isnan(new) or new > so_far else so_far
