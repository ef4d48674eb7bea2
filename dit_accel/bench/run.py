"""Measures declared rows: first the numerics, then the time of the whole call and of the fastest dense attention.

A row that fails the gate has no time. Sparse, dense and peer calls take turns in one run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import registry
from dit_accel.bench import balance
from dit_accel.bench.gate import Inexact, Problem, check
from dit_accel.bench.rows import OutOfReach, Row
from dit_accel.bench.timing import Call, alternate, profile, quantiles
from dit_accel.errors import DitAccelError, first_line
from dit_accel.generation.provenance import provenance
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Impl
from dit_accel.plans.routed import RoutedPlan

SEED = 0
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products of 2 * D operations a pair and head
TRIAL_SECONDS, TRIAL_ROUNDS = 0.2, 3  # for finding the fastest dense attention
SLOWER = 1.5  # times the fastest: what takes longer in its first call is not timed again
DENSE = "scaled_dot_product_attention"
DENSE_BACKENDS = {
    f"{DENSE} cudnn": SDPBackend.CUDNN_ATTENTION,
    f"{DENSE} flash": SDPBackend.FLASH_ATTENTION,
    f"{DENSE} efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Status = Literal["measured", "red", "out of reach", "refused"]


@dataclasses.dataclass(frozen=True)
class RowOutcome:
    """The result of a declared row, by its name: its record, or the reason why there is none."""

    name: str
    status: Status
    record: dict[str, Any] | None = None
    reason: str = ""


@dataclasses.dataclass
class Bench:
    """Measures rows on one device.

    Args:
        impl: "auto", or the name of an implementation in `kernels.impls`.
        seconds: for the timing of one row.
        peer: also time FlexAttention, if it compiles.
        profile: a file to which each row's name and profile (`timing.profile`) are added.
    """

    device: torch.device
    impl: Impl = "auto"
    seconds: float = 2.0
    peer: bool = False
    profile: Path | None = None

    def __post_init__(self) -> None:
        impls.check(self.impl)
        self.provenance = provenance(self.device)
        self._dense: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}

    def run(self, rows: Sequence[Row]) -> Iterator[RowOutcome]:
        """Measure the rows one by one; a failing row does not stop the others."""
        for row in rows:
            yield outcome_of(row.name, functools.partial(self.measure, row))

    def measure(self, row: Row) -> dict[str, Any]:
        """One record, with the fields of every kernel benchmark of this project.

        Raises:
            Inexact: the results are wrong; nothing was timed.
            DitAccelError: the setting cannot be made or the implementation cannot run it.
        """
        problem = make_problem(row, self.device, self.impl)
        gradients = row.direction != "forward"
        checks = check(problem, gradients=gradients)
        without_anchors = {name: getattr(problem, name)[:, :, : row.shape.tokens] for name in ("q", "k", "v", "grad")}
        stock = dataclasses.replace(problem, **without_anchors)  # the model's own attention, without a method's anchors
        dense_name, tried = self.best_dense(row, stock)
        calls = {
            "sparse": prepare(problem, problem.attend, row.direction),
            "dense": prepare(stock, _dense(dense_name), row.direction, weights=False),
        }
        peer = self._peer(problem, row, gradients=gradients) if self.peer else None
        if isinstance(peer, dict) and "call" in peer:
            calls["peer"] = peer.pop("call")
        milliseconds = alternate(calls, self.seconds, self.device)
        if self.profile is not None:
            with self.profile.open("a", encoding="utf-8") as file:
                file.write(f"{row.name}\n{profile(calls['sparse'], self.device)}\n")
        times = quantiles(milliseconds["sparse"])
        baseline = statistics.median(milliseconds["dense"])
        if peer is not None and "peer" in milliseconds:
            peer["ms_p50"] = statistics.median(milliseconds["peer"])
            peer["speedup"] = baseline / peer["ms_p50"]
        plan, density = problem.plan, _density(problem)
        operations = 2 * PRODUCTS[row.direction] * row.shape.head_dim * density * plan.grid.tokens**2
        implementation, reason = plan.prepare(
            self.device, problem.q.dtype, row.shape.head_dim, self.impl, learned=problem.module is not None
        )
        return {
            **row.as_dict(),
            "grid": str(plan.grid),
            "batch": 1,
            "density_asked": row.target.density,
            "density": density,
            "config": registry.settings_of(plan.config),
            "impl": implementation,
            "impl_asked": self.impl,
            "impl_reason": reason,
            **times,
            "rounds": len(milliseconds["sparse"]),
            "tflops_kept": operations * row.shape.heads / times["ms_p50"] / 1e9,
            "baseline": dense_name,
            "baseline_ms_p50": baseline,
            "baselines_tried": tried,
            "speedup": baseline / times["ms_p50"],
            "max_error": max(result.error for result in checks.values()),
            "checks": {name: result._asdict() for name, result in checks.items()},
            **({} if peer is None else {"peer": peer}),
            **self.provenance,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def best_dense(self, row: Row, problem: Problem) -> tuple[str, dict[str, Any]]:
        """The fastest dense attention for these sizes, and the milliseconds or error of each one tried."""
        if self.device.type != "cuda":
            return DENSE, {}  # the only one
        shape = row.shape
        key = (shape.tokens, shape.heads, shape.head_dim, row.dtype, row.direction)
        if key not in self._dense:
            tried: dict[str, Any] = {}
            for name in DENSE_BACKENDS:
                try:
                    call = prepare(problem, _dense(name), row.direction, weights=False)
                    milliseconds = alternate({name: call}, 0, self.device, 1)[name]
                    fastest = min((t for t in tried.values() if isinstance(t, float)), default=math.inf)
                    if milliseconds[0] <= SLOWER * fastest:
                        milliseconds = alternate({name: call}, TRIAL_SECONDS, self.device, TRIAL_ROUNDS)[name]
                    tried[name] = statistics.median(milliseconds)
                except RuntimeError as error:  # of a back end that does not take the call
                    tried[name] = first_line(error)
            timed = {name: outcome for name, outcome in tried.items() if isinstance(outcome, float)}
            if not timed:
                raise DitAccelError(f"No dense attention runs here: {tried}.")
            self._dense[key] = min(timed, key=lambda name: timed[name]), tried
        return self._dense[key]

    def _peer(self, problem: Problem, row: Row, *, gradients: bool) -> dict[str, Any]:
        """FlexAttention ready to be timed (`call`), or the reason against it."""
        peer: dict[str, Any] = {"name": "flex_attention"}
        other = dataclasses.replace(problem, impl="flex")
        try:
            checks = check(other, gradients=gradients)
            peer["call"] = prepare(other, other.attend, row.direction)
            peer["max_error"] = max(result.error for result in checks.values())
        except (RuntimeError, ValueError, Inexact) as error:  # compilers raise the first two
            peer["reason"] = first_line(error)
        return peer


def _density(problem: Problem) -> float:
    """The attended share of all pairs: the plan's own, or measured in one call of a routed plan."""
    plan, total = problem.plan, torch.zeros(2, device=problem.q.device)
    if plan.density is not None:
        return plan.density
    with torch.no_grad():
        plan.attend(problem.q, problem.k, problem.v, impl=problem.impl, module=problem.module, density_sum=total)
    density, calls = total.tolist()
    return density / calls


def outcome_of(name: str, measure: Callable[[], dict[str, Any]]) -> RowOutcome:
    """The outcome of measuring a row; expected errors become its reason."""
    try:
        return RowOutcome(name, "measured", measure())
    except Inexact as error:
        return RowOutcome(name, "red", reason=str(error))
    except DitAccelError as error:
        return RowOutcome(name, "out of reach" if isinstance(error, OutOfReach) else "refused", reason=str(error))
    except torch.OutOfMemoryError:
        return RowOutcome(name, "refused", reason="the device has too little memory for it")


def make_problem(row: Row, device: torch.device, impl: Impl = "auto") -> Problem:
    """Random tensors of a row's shape, in memory as models pass them, and its plan; errors as of `setting_on`."""
    shape, method = row.shape, registry.get_method(row.target.method)
    plan = row.target.setting_on(shape.grid).plan(shape.grid)
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, row.dtype)
    learned = method.learned(plan.config)
    plan.prepare(device, dtype, shape.head_dim, impl, learned=learned is not None)
    sizes = 1, plan.grid.tokens, shape.heads, shape.head_dim
    q, k, v, grad = (
        torch.randn(sizes, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    if learned is None:
        return Problem(q, k, v, grad, plan, impl)
    module = learned.make(shape.head_dim, shape.heads, plan.config).to(device)
    with torch.no_grad():  # zero weights would hide their inputs
        for parameter in module.parameters():
            std = shape.head_dim**-0.5 if parameter.ndim > 1 else 1.0
            parameter.normal_(std=std, generator=generator)
    return Problem(q, k, v, grad, plan, impl, module)


def prepare(problem: Problem, attend: Attend, direction: str, *, weights: bool = True) -> Call:
    """The call to time: forward, the gradients after a forward pass, or both; `weights`: with those of the module."""
    tensors = (problem.q, problem.k, problem.v)
    if direction == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attend(*tensors)

        return forward
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    leaves = (q, k, v, *(problem.weights.values() if weights else ()))
    if direction == "both":
        return lambda: torch.autograd.grad(attend(q, k, v), leaves, problem.grad)
    out = attend(q, k, v)
    return lambda: torch.autograd.grad(out, leaves, problem.grad, retain_graph=True)


def _dense(name: str) -> Attend:
    if name == DENSE:
        return F.scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(DENSE_BACKENDS[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def count(row: Row) -> dict[str, Any]:
    """A row's declaration with its work, in 10^12 operations of all heads: matrix products alone.

    It is counted from the row's plan: any computer does it, and no attention is computed.

    Returns:
        `tflop`: least and most, of the attended pairs; `block_tflop`: of the blocks that a kernel visits, None if only
        a call tells; `dense_tflop`: of all pairs; `ulysses`: by number of GPUs, as in `balance.of_method`.
    """
    shape = row.shape
    plan = row.target.setting_on(shape.grid).plan(shape.grid)
    tflop_a_pair = 2 * PRODUCTS[row.direction] * shape.head_dim * shape.heads / 1e12
    if isinstance(plan, RoutedPlan):
        bounds, visited, orders = plan.bounds, plan.visited, (plan.query_order, plan.key_order)
        computed = None if visited is None else visited * orders[0].block * orders[1].block * tflop_a_pair
    else:
        assert plan.pairs is not None
        bounds, computed = (plan.pairs, plan.pairs), shape.tokens**2 * tflop_a_pair
        if plan.pairs < shape.tokens**2:
            blocks = plan.block_mask()
            computed = (
                blocks.visited * blocks.query_order.block * blocks.key_order.block * tflop_a_pair * plan.head_share
            )
    work = {"tflop": [pairs * tflop_a_pair for pairs in bounds], "block_tflop": computed}
    shared = balance.of_method(row.target.method, shape.heads)
    return {**row.as_dict(), **work, "dense_tflop": shape.tokens**2 * tflop_a_pair, "ulysses": shared}
