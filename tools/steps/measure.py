"""One denoising step of whole models, dense and with each method: `python -m tools.steps.measure --list`.

A step is one call of the transformer. A method's attention is checked on the model's shape before its step is timed
(`dit_accel.bench.gate`). A step whose attention copies v gives the time of all other work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from dit_accel.accelerator import Accelerator
from dit_accel.bench import results
from dit_accel.bench.gate import check
from dit_accel.bench.rows import Row, Shape, Target
from dit_accel.bench.run import DENSE, DENSE_BACKENDS, Bench, RowOutcome, make_problem, outcome_of
from dit_accel.bench.timing import alternate, quantiles
from dit_accel.cli import Interrupted
from dit_accel.cli.bench import measured, names_in, print_table, targets_of
from dit_accel.errors import DitAccelError
from dit_accel.files import check_file
from dit_accel.generation.setup import placement
from dit_accel.hooks.report import Report
from dit_accel.hooks.selfcheck import SelfCheck
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.impls import Impl
from dit_accel.method import Method, MethodConfig
from dit_accel.pipelines.family import Memory, ModelInputs
from dit_accel.pipelines.targets import find_transformers
from dit_accel.plans.plan import Plan, PlanArguments
from dit_accel.registry import get_method
from dit_accel.setting import Setting
from tools.steps.models import MODES, Model, ModelStep, select_steps

ROUNDS = 2  # least number of timed steps: one of a long video takes half a minute
INTERRUPTED = 130
COLUMNS = {
    "step": "{model} {mode}\n  {method} {setting}",
    "density": "{density:.4f}",
    "ms": "{step_ms_p50:.1f}",
    "dense ms": "{dense_step_ms_p50:.1f}",
    "rest ms": "{rest_ms_p50:.1f}",
    "speed-up": "{speedup:.2f}",
    "share": "{attention_share:.2f}",
    "GiB": "{memory}",
}


class NothingPlan(Plan):
    """No attention, for the time of the rest of a step."""

    @property
    def pairs(self) -> int:
        return 0

    def kept_keys(self, queries: torch.Tensor, lists: BlockLists | None = None, head: int = 0) -> torch.Tensor:
        return torch.zeros(len(queries), self.grid.tokens, dtype=torch.bool, device=queries.device)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments) -> torch.Tensor:
        return v.clone()  # a compiled model's operator must not return its input

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        return {}

    def prepare(self, *call: Any, **more: Any) -> tuple[str, str]:
        return "nothing", "the rest of the step is measured"


@dataclasses.dataclass(frozen=True)
class NothingConfig(MethodConfig):
    """No settings."""


NOTHING = Method(
    "nothing",
    NothingConfig,
    lambda grid, config: NothingPlan("nothing", config, grid),
    "no attention",
    "-",
    "the time of the rest",
)


@dataclasses.dataclass
class StepBench:
    """Measures steps on one device.

    Args:
        impl: "auto", or the name of an implementation in `kernels.impls`.
        seconds, rounds: for each timing, after a warm-up round; at least so many rounds.
        dtype: of weights and activations.
        backend: of `torch.compile`.
    """

    device: torch.device
    impl: Impl = "auto"
    seconds: float = 2.0
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        self._attention = Bench(self.device, self.impl)

    def run(self, steps: Sequence[ModelStep]) -> Iterator[RowOutcome]:
        """Measure the steps by model and mode; a failing step does not stop the others."""
        for model, of_model in itertools.groupby(steps, key=lambda step: step.model):
            steps_of_model = list(of_model)
            try:
                subject = Subject(model, self.device, self.dtype)
                for mode, of_mode in itertools.groupby(steps_of_model, key=lambda step: step.mode):
                    yield from self._run_mode(subject, mode, list(of_mode))
            except DitAccelError as error:
                yield RowOutcome(steps_of_model[0].name, "refused", reason=f"all of {model.shape.name}: {error}")
            except torch.OutOfMemoryError:
                reason = f"all of {model.shape.name}: the device has too little memory"
                yield RowOutcome(steps_of_model[0].name, "refused", reason=reason)
            subject = None  # type: ignore[assignment]  # freed before the next model is built
            self._forget()

    def _run_mode(self, subject: Subject, mode: str, steps: list[ModelStep]) -> Iterator[RowOutcome]:
        if mode == "compiled":
            subject.compile(self.backend)
        backends = self._dense_backends(subject)
        dense = self._timed(subject, backends)
        rest, _ = self._accelerated(subject, NOTHING, Setting(NOTHING.name, NothingConfig()))
        shared = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense_step_ms_p50": dense["ms_p50"],
            "dense_attention_share": 1 - rest["ms_p50"] / dense["ms_p50"],
            "dense_peak_memory_bytes": dense["peak"],
            "rest_ms_p50": rest["ms_p50"],
            "baseline": backends[0] if backends else DENSE,
        }
        for step in steps:
            outcome = outcome_of(step.name, functools.partial(self._measure, step, subject, shared))
            self._forget()
            yield outcome

    def _measure(self, step: ModelStep, subject: Subject, shared: dict[str, Any]) -> dict[str, Any]:
        target, method = step.target, get_method(step.target.method)
        setting = target.setting_on(subject.grid)
        row = subject.row(dataclasses.replace(target, setting=setting))
        problem = make_problem(row, self.device, self.impl)
        checks = check(problem, gradients=False)
        preset = subject.family.recommended.get(target.method) if target.density is None else None
        dense_layers = 0 if preset is None else preset.schedule.get("dense_layers", 0)
        times, report = self._accelerated(subject, method, setting.changed(dense_layers=dense_layers))
        sparse = [layer for layer in report.layers if layer.sparse_calls]
        dense, rest, step_ms = shared["dense_step_ms_p50"], shared["rest_ms_p50"], times["ms_p50"]
        return {
            **step.as_dict(),
            "config": setting.as_dict()["config"],
            "dense_layers": dense_layers,
            "density": sparse[0].density,
            "impl": next(iter(sparse[0].kernels)),
            "impl_asked": self.impl,
            "grid": str(subject.grid),
            "tokens": subject.grid.tokens,
            "batch": 1,
            "layers": len(report.layers),
            "sparse_layers": len(sparse),
            "step_ms_p50": step_ms,
            "step_ms_p20": times["ms_p20"],
            "step_ms_p80": times["ms_p80"],
            "rounds": times["rounds"],
            "speedup": dense / step_ms,
            "attention_share": 1 - rest / step_ms,
            "peak_memory_bytes": times["peak"],
            "max_error": max(result.error for result in checks.values()),
            **shared,
            **self._attention.provenance,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _dense_backends(self, subject: Subject) -> list[str]:
        """On a GPU PyTorch's attentions, the fastest at the model's sizes first; none elsewhere."""
        if self.device.type != "cuda":
            return []
        row = subject.row(Target.of("dense"))
        _, tried = self._attention.best_dense(row, make_problem(row, self.device))
        return sorted((name for name, time in tried.items() if isinstance(time, float)), key=lambda name: tried[name])

    def _accelerated(self, subject: Subject, method: Method, setting: Setting) -> tuple[dict[str, Any], Report]:
        """Times with a method at work, and its report."""
        torch.compiler.reset()  # each setting is a new graph, and the compiler allows eight
        accel = Accelerator(subject.transformers, None, method, setting, self.impl, SelfCheck())
        accel.apply()
        try:
            return self._timed(subject, []), accel.report()
        finally:
            accel.remove()

    def _timed(self, subject: Subject, backends: list[str]) -> dict[str, Any]:
        """Quantiles, rounds and peak memory of the transformer's call."""

        def call() -> Any:
            # a call goes to the first of the attentions that takes it
            chosen = [DENSE_BACKENDS[name] for name in backends]
            with torch.no_grad(), sdpa_kernel(chosen, set_priority=True) if chosen else nullcontext():
                return subject.transformer(**subject.inputs)

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        milliseconds = alternate({"step": call}, self.seconds, self.device, self.rounds)["step"]
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return {**quantiles(milliseconds), "rounds": len(milliseconds), "peak": peak}

    def _forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Subject:
    """A model to measure: its transformer, fixed random inputs of one call, and its family.

    Raises:
        DitAccelError: no family has the transformer's class, or it cannot read the call.
    """

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, str(dtype).removeprefix("torch.")
        self.transformer = model.build(device, dtype)
        config: Any = self.transformer.config
        torch.manual_seed(1)
        with device:
            inputs = model.inputs(config, model.shape.axes, model.shape.text or model.text, dtype)
        self.inputs = inputs | {"return_dict": False}
        self.transformers, _ = find_transformers(self.transformer)
        ((_, self.family),) = self.transformers.values()
        signature = inspect.signature(type(self.transformer).forward)
        call = ModelInputs(signature, self.transformer, (), self.inputs, Memory())
        self.grid = self.family.layout(self.transformer, call).grid

    def row(self, target: Target) -> Row:
        """The model's attention as a row of `dit-accel bench`: forward, of this target."""
        _, attention = next(iter(self.family.attentions(self.transformer)))
        heads: Any = attention.heads
        sizes = int(heads), self.family.head_dim(attention), self.grid.text, self.grid.text_first
        return Row(Shape(self.model.shape.name, self.grid.shape, *sizes), target, self.dtype, "forward")

    def compile(self, backend: str) -> None:
        """Compile the repeated blocks, as Diffusers does, or else the whole transformer."""
        transformer: Any = self.transformer
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks(backend=backend)
        else:
            transformer.compile(backend=backend)


def show(records: list[dict[str, Any]]) -> None:
    """Print a table of measured steps."""
    peaks = [record["peak_memory_bytes"] for record in records]
    rows = [
        record | {"memory": "-" if peak is None else f"{peak / 2**30:.1f}"}
        for record, peak in zip(records, peaks, strict=True)
    ]
    print_table(rows, COLUMNS, "one call of the transformer; rest: what is not attention; share: of attention")


def run(options: argparse.Namespace) -> int:
    """List, measure or show steps; the status is 1 if a reachable step was not measured."""
    if options.read is not None:
        show(results.read(options.read, "model"))
        return 0
    targets = targets_of(options.method) or None
    steps = select_steps(options.shape, targets, options.density, options.mode, options.rows)
    if options.list:
        print("\n".join(step.name for step in steps))
        return 0
    device = placement(options.device, "float32", "none")[0]
    if options.shape is None and device.type != "cuda":
        raise DitAccelError(
            "These models have up to 14 billion weights, and this machine has no GPU. Name one with --shape to try."
        )
    if options.output is not None:
        check_file(options.output, (".jsonl",))
    if options.resume:
        known = names_in(options.output, device, options.impl, "model")
        steps = [step for step in steps if step.name not in known]
    if not steps:
        print(f"{options.output} has all of these rows already.", file=sys.stderr)
        return 0
    outcomes = StepBench(device, options.impl, options.seconds, rounds=options.rounds).run(steps)
    records, status = measured(outcomes, len(steps), options.output, "step_ms_p50")
    show(records)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.steps.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="a model by its shape, repeatable; on a GPU all if not given")
    parser.add_argument("--method", action="append", default=[], help="METHOD[:KEY=VALUE,...], repeatable")
    parser.add_argument("--density", action="append", type=float, help="share of pairs kept, repeatable, such as 0.1")
    parser.add_argument("--mode", action="append", help=f"{' or '.join(MODES)}, repeatable; both if not given")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="only rows whose name matches")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--impl", default="auto", help="the implementation; a named one runs or is refused")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each row, at least --rounds rounds")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="least number of timed steps; default %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="each row is added to it when it is measured")
    parser.add_argument("--resume", action="store_true", help="leave out rows that --output has from here")
    parser.add_argument("--list", action="store_true", help="measure nothing: list the declared rows")
    parser.add_argument("--read", type=Path, metavar="FILE.jsonl", help="measure nothing: show the rows of this file")
    try:
        sys.exit(run(parser.parse_args()))
    except DitAccelError as error:
        parser.error(str(error))
    except Interrupted as stop:
        parser.exit(INTERRUPTED, f"{stop}\n")


if __name__ == "__main__":
    main()
