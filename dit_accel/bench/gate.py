"""The check before any timing: a kernel's result for some queries of the full shape against the exact one.

A plan's `reference` in fp64 gives the exact result. Gradients are those of a loss over
the sampled queries. So dk and dv are sums over these queries, and every key takes part.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from dit_accel.kernels.impls import Impl
from dit_accel.plans.plan import Plan
from dit_accel.plans.sampled import SampledQueries
from dit_accel.tokens import TokenGrid

# Exactly computed pairs of a head: a few hundred queries of a long video, 1,024 of 8,192 tokens. Over fewer queries the
# largest error varies: over 128, plain PyTorch's varied by a factor of three between samples.
PAIRS = 1 << 23
OTHERS = 8  # one query in so many is a text or conditioning token


class Inexact(Exception):
    """A result is too far from the exact one, so it is not timed."""


class ErrorCheck(NamedTuple):
    """Largest error of a tensor against fp64, and its limit."""

    error: float
    budget: float


@dataclasses.dataclass
class Problem:
    """One call: tensors [1, H, N, D] as a model passes them, plan, implementation and learned weights."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    plan: Plan
    impl: Impl
    module: torch.nn.Module | None = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The module's parameters with a gradient by the name of it, such as dproj.weight."""
        named = () if self.module is None else self.module.named_parameters()
        return {f"d{name}": parameter for name, parameter in named if parameter.requires_grad}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The whole call: routing, attention, and learned parts."""
        return self.plan.attend(q, k, v, impl=self.impl, module=self.module)


def check(problem: Problem, *, gradients: bool) -> dict[str, ErrorCheck]:
    """Compare the call with fp64 on sampled queries, all heads: a check for each tensor by name.

    The limit is twice the error of plain PyTorch in the same dtype plus one rounding of the terms that are summed, with
    the largest errors over heads.

    Args:
        gradients: also check the gradients of q, k, v and of the module's weights.

    Raises:
        Inexact: an error is above its limit, or the plan kept wrong pairs.
    """
    rows = sample(problem.plan.grid).to(problem.q.device)
    got = _results(problem, rows, gradients=gradients)
    worst = {name: [0.0, 0.0, 0.0] for name in got}  # of the error, of plain PyTorch's error, and of the size
    weights: dict[str, list[torch.Tensor]] = {name: [] for name in got if name in problem.weights}
    call = SampledQueries(problem.plan, rows, problem.q, problem.k, problem.impl, problem.module, problem.v)
    flaw = problem.plan.misrouted(call)
    if flaw is not None:
        raise Inexact(flaw)

    def compare(name: str, result: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, size: torch.Tensor) -> None:
        worst[name] = list(map(_worst, worst[name], (result.double() - exact, plain.double() - exact, size)))

    for head in range(problem.q.shape[1]):
        exact, plain = (
            _head(problem, call, head, dtype, gradients=gradients) for dtype in (torch.float64, problem.q.dtype)
        )
        size = {name: value.abs() for name, value in exact.items()}
        if gradients:
            for name, value in _magnitudes(problem, head, rows, call.seen(head)).items():
                size[name] = size[name] + value
        for name in got:
            if name in weights:  # summed over heads
                weights[name].append(torch.stack([exact[name], plain[name].double(), size[name]]))
            else:
                compare(name, got[name][head], exact[name], plain[name], size[name])
    for name, parts in weights.items():
        compare(name, got[name], *torch.stack(parts).sum(0))
    epsilon = torch.finfo(problem.q.dtype).eps
    checks = {name: ErrorCheck(error, 2 * near + epsilon * size) for name, (error, near, size) in worst.items()}
    for name, (error, budget) in checks.items():
        if not error <= budget:  # NaN is not
            raise Inexact(f"{name}: error {error:.3g}, at most {budget:.3g} allowed")
    return checks


def sample(grid: TokenGrid) -> torch.Tensor:
    """Queries to compare, in model order: spread over visual and over other tokens, with the ends of both."""
    count = min(grid.tokens, max(OTHERS, PAIRS // grid.tokens))
    tokens = torch.arange(grid.tokens)
    visual = (tokens >= grid.visual_start) & (tokens < grid.visual_start + grid.visual)
    some = [_spaced(tokens[visual], count), _spaced(tokens[~visual], count // OTHERS)]
    return torch.cat(some).sort().values


def _spaced(tokens: torch.Tensor, count: int) -> torch.Tensor:
    count = min(count, len(tokens))
    places = torch.linspace(0, max(len(tokens) - 1, 0), count, dtype=torch.float64)
    return tokens[places.round().long()]


def _results(problem: Problem, rows: torch.Tensor, *, gradients: bool) -> dict[str, torch.Tensor]:
    """The call's results: rows [H, S, D] of output and dq, and the other gradients whole."""
    if not gradients:
        with torch.no_grad():
            return {"out": problem.attend(problem.q, problem.k, problem.v)[0, :, rows]}
    q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
    out = problem.attend(q, k, v)
    only = torch.zeros_like(problem.grad)
    only[:, :, rows] = problem.grad[:, :, rows]
    dq, dk, dv, *others = torch.autograd.grad(out, (q, k, v, *problem.weights.values()), only)
    results = {"out": out.detach()[0, :, rows], "dq": dq[0, :, rows], "dk": dk[0], "dv": dv[0]}
    return results | dict(zip(problem.weights, others, strict=True))


def _head(
    problem: Problem, call: SampledQueries, head: int, dtype: torch.dtype, *, gradients: bool
) -> dict[str, torch.Tensor]:
    """One head's rows by plain PyTorch, in a dtype: the output [S, D], and gradients by name."""
    rows, weights = call.rows, problem.weights
    tensors = [problem.q[0, head, rows], problem.k[0, head], problem.v[0, head], *weights.values()]
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in tensors]
    with torch.set_grad_enabled(gradients):
        out = problem.plan.reference(call, head, *leaves)
    if not gradients:
        return {"out": out}
    gradient = torch.autograd.grad(out, leaves, problem.grad[0, head, rows].to(dtype), materialize_grads=True)
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv", *weights), gradient, strict=True))


def _magnitudes(problem: Problem, head: int, rows: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The size of the terms of dq and dk before they cancel: p (|dp| + |delta|) times |k| or |q|."""
    q, k, v = (x[0, head].double() for x in (problem.q, problem.k, problem.v))
    q, gradient, scale = q[rows], problem.grad[0, head, rows].double(), problem.q.shape[-1] ** -0.5
    weights = (q @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0)  # a head that is not computed
    delta = (gradient.abs() * (weights @ v).abs()).sum(-1, keepdim=True)
    terms = weights * (gradient.abs() @ v.abs().T + delta) * scale
    return {"dq": terms @ k.abs(), "dk": terms.T @ q.abs()}


def _worst(so_far: float, values: torch.Tensor) -> float:
    """The largest magnitude so far; NaN stays."""
    new = values.abs().max().item()
    return new if math.isnan(new) or new > so_far else so_far
