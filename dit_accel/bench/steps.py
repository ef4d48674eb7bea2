"""Measures one denoising step of whole models: the transformer's call, dense and with each method.

A method's attention is checked on the model's shape before its step is timed (`dit_accel.bench.gate`). A step whose
attention copies v gives the time of all other work.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from dit_accel.accelerator import Accelerator
from dit_accel.bench.rows import MethodSetting, ModelStep, Row, Shape
from dit_accel.bench.run import DENSE, DENSE_BACKENDS, Bench, RowOutcome, make_problem, outcome_of
from dit_accel.bench.timing import alternate, quantiles
from dit_accel.errors import DitAccelError
from dit_accel.hooks.report import Report
from dit_accel.hooks.schedule import Schedule
from dit_accel.hooks.selfcheck import SelfCheck
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.impls import Impl
from dit_accel.pipelines.family import Memory, ModelCall
from dit_accel.pipelines.targets import find_transformers
from dit_accel.plans.plan import Plan, PlanCall
from dit_accel.registry import Method, get_method, make_config

ROUNDS = 2  # least number of timed steps: one of a long video takes half a minute


class NothingPlan(Plan):
    """No attention, for the time of the rest of a step."""

    @property
    def pairs(self) -> int:
        return 0

    def kept_keys(self, queries: torch.Tensor, lists: BlockLists | None = None, head: int = 0) -> torch.Tensor:
        return torch.zeros(len(queries), self.grid.tokens, dtype=torch.bool, device=queries.device)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanCall) -> torch.Tensor:
        return v.clone()  # a compiled model's operator must not return its input

    def prepare(self, *call: Any, **more: Any) -> tuple[str, str]:
        return "nothing", "the rest of the step is measured"


@dataclasses.dataclass(frozen=True)
class NothingConfig:
    """No settings."""


NOTHING = Method(
    "nothing", NothingConfig, lambda grid, config: NothingPlan("nothing", config, grid), "no attention", "-"
)


@dataclasses.dataclass
class StepBench:
    """Measures steps on one device.

    Args:
        impl: "auto", or the name of an implementation in `kernels.impls`.
        seconds: for each timing, after a warm-up round; at least `ROUNDS` rounds.
        dtype: of weights and activations.
        backend: of `torch.compile`.
    """

    device: torch.device
    impl: Impl = "auto"
    seconds: float = 2.0
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"

    def __post_init__(self) -> None:
        self._attention = Bench(self.device, self.impl)

    def run(self, steps: Sequence[ModelStep]) -> Iterator[RowOutcome]:
        """Measure the steps by model and mode; a failing step does not stop the others."""
        for shape, of_model in itertools.groupby(steps, key=lambda step: step.shape):
            asked = list(of_model)
            try:
                subject = Subject(shape, self.device, self.dtype)
                for mode, of_mode in itertools.groupby(asked, key=lambda step: step.mode):
                    yield from self._run_mode(subject, mode, list(of_mode))
            except DitAccelError as error:
                yield RowOutcome(asked[0], "refused", reason=f"all of {shape.name}: {error}")
            except torch.OutOfMemoryError:
                yield RowOutcome(asked[0], "refused", reason=f"all of {shape.name}: the device has too little memory")
            subject = None  # type: ignore[assignment]  # freed before the next model is built
            self._forget()

    def _run_mode(self, subject: Subject, mode: str, steps: list[ModelStep]) -> Iterator[RowOutcome]:
        if mode == "compiled":
            subject.compile(self.backend)
        backends = self._dense_backends(subject)
        dense = self._timed(subject, backends)
        rest, _ = self._accelerated(subject, NOTHING, NothingConfig(), 0)
        shared = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense_step_ms_p50": dense["ms_p50"],
            "dense_attention_share": 1 - rest["ms_p50"] / dense["ms_p50"],
            "dense_peak_memory_bytes": dense["peak"],
            "rest_ms_p50": rest["ms_p50"],
            "baseline": backends[0] if backends else DENSE,
        }
        for step in steps:
            outcome = outcome_of(step, functools.partial(self._measure, step, subject, shared))
            self._forget()
            yield outcome

    def _measure(self, step: ModelStep, subject: Subject, shared: dict[str, Any]) -> dict[str, Any]:
        setting, method = step.setting, get_method(step.setting.method)
        given = setting.config_on(subject.grid)
        config = make_config(setting.method, given)
        checks = self._attention.gate(subject.row(dataclasses.replace(setting, config=given)))
        preset = subject.family.recommended.get(setting.method) if setting.density is None else None
        dense_layers = 0 if preset is None else preset.schedule.get("dense_layers", 0)
        times, report = self._accelerated(subject, method, config, dense_layers)
        sparse = [layer for layer in report.layers if layer.sparse_calls]
        dense, rest, own = shared["dense_step_ms_p50"], shared["rest_ms_p50"], times["ms_p50"]
        return {
            **step.as_dict(),
            "config": dataclasses.asdict(config),
            "dense_layers": dense_layers,
            "density": sparse[0].density,
            "impl": next(iter(sparse[0].kernels)),
            "grid": str(subject.grid),
            "tokens": subject.grid.tokens,
            "batch": 1,
            "layers": len(report.layers),
            "sparse_layers": len(sparse),
            "step_ms_p50": own,
            "step_ms_p20": times["ms_p20"],
            "step_ms_p80": times["ms_p80"],
            "rounds": times["rounds"],
            "speedup": dense / own,
            "attention_share": 1 - rest / own,
            "peak_memory_bytes": times["peak"],
            "max_error": max(found.error for found in checks.values()),
            **shared,
            **self._attention.provenance,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _dense_backends(self, subject: Subject) -> list[str]:
        """On a GPU PyTorch's attentions, the fastest at the model's sizes first; none elsewhere."""
        if self.device.type != "cuda":
            return []
        row = subject.row(MethodSetting("dense", None, {}))
        _, tried = self._attention.best_dense(row, make_problem(row, self.device))
        return sorted((name for name, found in tried.items() if isinstance(found, float)), key=lambda name: tried[name])

    def _accelerated(
        self, subject: Subject, method: Method, config: Any, dense_layers: Any
    ) -> tuple[dict[str, Any], Report]:
        """Times with a method at work, and its report."""
        torch.compiler.reset()  # each setting is a new graph, and the compiler allows eight
        schedule = Schedule(dense_layers=dense_layers)
        accel = Accelerator(subject.found, None, method, config, schedule, self.impl, False, SelfCheck())
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
        taken = alternate({"step": call}, self.seconds, self.device, ROUNDS)["step"]
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return {**quantiles(taken), "rounds": len(taken), "peak": peak}

    def _forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Subject:
    """A model to measure: the shape's transformer, fixed random inputs of one call, and its family.

    Raises:
        DitAccelError: no family has the transformer's class, or it cannot read the call.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        model = shape.transformer
        assert model is not None
        self.shape, self.dtype = shape, str(dtype).removeprefix("torch.")
        self.transformer = model.build(device, dtype)
        config: Any = self.transformer.config
        torch.manual_seed(1)
        with device:
            self.inputs = model.inputs(config, shape.axes, shape.text or model.text, dtype) | {"return_dict": False}
        self.found, _ = find_transformers(self.transformer)
        ((_, self.family),) = self.found.values()
        signature = inspect.signature(type(self.transformer).forward)
        call = ModelCall(signature, self.transformer, (), self.inputs, Memory())
        self.grid = self.family.layout(self.transformer, call).grid

    def row(self, setting: MethodSetting) -> Row:
        """The model's attention as a row of `bench`: forward, with this setting."""
        _, attention = next(iter(self.family.attentions(self.transformer)))
        heads: Any = attention.heads
        sizes = int(heads), self.family.head_dim(attention), self.grid.text, self.grid.text_first
        return Row(Shape(self.shape.name, self.grid.shape, *sizes), setting, self.dtype, "forward")

    def compile(self, backend: str) -> None:
        """Compile the repeated blocks, as Diffusers does, or else the whole transformer."""
        transformer: Any = self.transformer
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks(backend=backend)
        else:
            transformer.compile(backend=backend)
