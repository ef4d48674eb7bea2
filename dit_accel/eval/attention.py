"""Measures a method's error against dense attention and its kept softmax mass, by layer and step.

    with accelerated(pipe, "gna", window=0.5) as accel:
        record = record_attention(accel, lambda: pipe(prompt), steps=(0, 8, 15))
    record.worst(3)  # the layers to keep dense first

`dit_accel.hooks.selfcheck` measures both on sampled queries of the run's own q, k and v.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.accelerator import Accelerator
from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import ComputedAttention, Measured

Indices = tuple[int, ...] | None  # None: all
QUERIES = 64  # sampled in each head of a call


@dataclass(frozen=True)
class MapChoice:
    """The denoising steps and layers to measure; None: all."""

    steps: Indices = None
    layers: Indices = None


@dataclass
class AttentionRecord:
    """Measured layers × steps, one figure a head.

    Attributes:
        layers: names of transformer and layer as in `Accelerator.report()`, in the order they run.
        queries: sampled in each head of a call.
        error: by (layer, step), for each head: norm of sparse minus dense over the norm of dense, over all samples and
            calls of the step. A dense layer has no entry.
        mass: likewise the share of dense attention's softmax weight on kept pairs.
    """

    steps: list[int]
    layers: list[str]
    queries: int
    error: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    mass: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def worst(self, count: int) -> list[str]:
        """The `count` layers with the largest mean error over steps and heads, the largest first."""
        errors: dict[str, list[float]] = defaultdict(list)
        for (layer, _), heads in self.error.items():
            errors[layer] += heads
        return sorted(errors, key=lambda layer: sum(errors[layer]) / len(errors[layer]), reverse=True)[:count]

    def as_json(self) -> dict[str, Any]:
        """Plain lists: `error[layer][step][head]` and `mass` alike; None in place of the heads of a dense layer."""
        return {
            "steps": self.steps,
            "layers": self.layers,
            "queries": self.queries,
            "error": [[self.error.get((layer, step)) for step in self.steps] for layer in self.layers],
            "mass": [[self.mass.get((layer, step)) for step in self.steps] for layer in self.layers],
        }


def record_attention(
    accel: Accelerator, run: Callable[[], Any], steps: Indices = None, layers: Indices = None, queries: int = QUERIES
) -> AttentionRecord:
    """Measure the sparse attention calls of one run, on so many sampled queries in each head of a call.

    `run` calls the pipeline once; its transformers are not compiled. `layers` are indices in each transformer, in the
    order they run.

    Raises:
        DitAccelError: the run has no such step or the model no such layer, or the steps are unknown.
    """
    names = _chosen_layers(accel, layers)
    measured: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    seen: set[int] = set()

    def note(call: ComputedAttention) -> None:
        if call.step is None:
            raise DitAccelError("The step of this call is unknown. Accelerate the pipeline, or call set_step.")
        seen.add(call.step.index)
        if call.step.count is not None:
            seen.update(range(call.step.count))
        name = f"{call.transformer}.{call.layer}"
        if name in names and (steps is None or call.step.index in steps):
            measured[name, call.step.index].append(call.measure(queries))

    with accel.watch(note):
        run()
    beyond = [step for step in steps or () if seen and step not in seen]
    if beyond:
        raise DitAccelError(f"There is no step {beyond[0]} to measure: this run has steps 0 to {max(seen)}.")
    return AttentionRecord(
        steps=sorted(seen) if steps is None else list(steps),
        layers=names,
        queries=queries,
        error={
            key: (_total(calls, "difference").sum(0) / _total(calls, "size").sum(0)).sqrt().tolist()
            for key, calls in measured.items()
        },
        mass={key: _total(calls, "mass").mean(0).tolist() for key, calls in measured.items()},
    )


def _total(calls: list[Measured], name: str) -> torch.Tensor:
    """One figure of all samples of some calls: float64 [samples, heads]."""
    return torch.cat([getattr(call, name) for call in calls])


def _chosen_layers(accel: Accelerator, layers: Indices) -> list[str]:
    """Names of the chosen layers of all transformers."""
    by_transformer: dict[str, list[str]] = defaultdict(list)
    for layer in accel.report().layers:
        by_transformer[layer.transformer].append(f"{layer.transformer}.{layer.name}")
    names = []
    for transformer, layer_names in by_transformer.items():
        beyond = [index for index in layers or () if index >= len(layer_names)]
        if beyond:
            raise DitAccelError(f"{transformer} has no layer {beyond[0]}: its layers are 0 to {len(layer_names) - 1}.")
        names += layer_names if layers is None else [layer_names[index] for index in layers]
    return names


def parse_choice(text: str) -> MapChoice:
    """Read ``steps=0,8-15,layers=0,1``; a missing part, or ``all``, means all."""
    form = r"(steps|layers)=(all|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)"
    parts = [re.fullmatch(form, part) for part in re.split(r",(?=[a-z])", text.replace(" ", ""))]
    chosen = {part[1]: _indices(part[2]) for part in parts if part}
    if not all(parts) or len(chosen) < len(parts):
        raise DitAccelError(f"Steps and layers are written steps=0,8-15,layers=0,1 or layers=all, got {text!r}.")
    return MapChoice(**chosen)


def _indices(text: str) -> Indices:
    if text == "all":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise DitAccelError(f"{part} counts down. Write the smaller number first.")
        chosen.update(span)
    return tuple(sorted(chosen))
