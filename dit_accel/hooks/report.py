"""What an accelerator did: calls, densities, kernels and the reason for every dense call."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dit_accel.caches.record import CacheReport
from dit_accel.pipelines.ring import Traffic
from dit_accel.setting import Setting

NOTHING_GAINED = "kept every pair: nothing was gained"
GRIDS_SHOWN = 8  # in a report's text
STEPS_SHOWN = 8
ROUNDING = 1e-6  # of densities that are summed in float32


@dataclasses.dataclass
class LayerReport:
    """One self-attention layer.

    Attributes:
        transformer: name of the pipeline's component.
        name: dotted path of the attention module.
        sparse_calls, dense_calls: number of each.
        density: attended share of all pairs, averaged over the sparse calls; None without any. Routed methods measure
            it on the device.
        step_density: density by denoising step, counted from 0, for ramps and for routed methods, which measure it;
            if the step is known.
        kernels: implementations that computed the sparse calls, and why each was chosen.
        dense_reasons: dense calls by reason.
        permuted: sparse calls along a curve, by where their tokens were permuted: "stack" (once for a run of layers) or
            "layer" (q, k, v and the output in the call).
        left: class of a processor that was set since; its calls are dense.
        relative_error: norm of sparse minus dense attention over the norm of dense, over sampled queries of the first
            sparse call; None unless verified. A layer kept dense has the error of its discarded sparse result.
        kept_mass: share of dense attention's softmax weight on the kept keys, over the same queries.
        kept_bytes: the most that the layer kept between denoising steps.
    """

    transformer: str
    name: str
    sparse_calls: int = 0
    dense_calls: int = 0
    density: float | None = None
    step_density: dict[int, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    dense_reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    permuted: dict[str, int] = dataclasses.field(default_factory=dict)
    left: str | None = None
    relative_error: float | None = None
    kept_mass: float | None = None
    kept_bytes: int = 0

    def describe(self) -> str:
        parts = []
        if self.sparse_calls:
            kernels = "; ".join(f"{name}: {why}" for name, why in self.kernels.items())
            parts.append(f"{self.sparse_calls} sparse at density {self.density:.4f} ({kernels})")
        if self.permuted:
            parts.append(f"tokens permuted by {' and '.join(self.permuted)}")
        parts += [f"{count} dense ({reason})" for reason, count in self.dense_reasons.items()]
        if self.relative_error is not None:
            error, mass = f"relative error {self.relative_error:.3g}", f"softmax mass kept {self.kept_mass:.3f}"
            parts.append(f"first call: {error}, {mass}")
        if self.kept_bytes:
            parts.append(f"at most {self.kept_bytes:,} bytes kept between steps")
        if self.left is not None:
            parts.append(f"no longer accelerated: {self.left} was set since")
        return ", ".join(parts) or "not called"


@dataclasses.dataclass(repr=False)
class Report:
    """What an accelerator did; prints as a table, and `as_dict` is JSON.

    Attributes:
        setting: method, settings and schedule.
        impl: the implementation asked for.
        calls: calls of each transformer.
        grids: the plans' densities by grid, the mean over sparse layers; None if only calls tell the density.
        layers: in the order they run.
        notes: further remarks.
        cache: what the step cache did; None without one.
        traffic: by transformer, what this process has exchanged, if processes share the tokens.
    """

    setting: Setting
    impl: str
    calls: dict[str, int]
    grids: dict[str, float | None]
    layers: list[LayerReport]
    notes: list[str] = dataclasses.field(default_factory=list)
    cache: CacheReport | None = None
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> int:
        return sum(layer.dense_calls for layer in self.layers)

    @property
    def step_density(self) -> dict[int, float]:
        """The density of each sparse step, the mean over the layers that tell it."""
        steps = sorted({step for layer in self.layers for step in layer.step_density})
        by_step = {step: [layer.step_density.get(step) for layer in self.layers] for step in steps}
        known = {step: [density for density in row if density is not None] for step, row in by_step.items()}
        return {step: sum(densities) / len(densities) for step, densities in known.items()}

    def _step_lines(self) -> list[str]:
        """Of ramps, the density at a few steps from the first sparse one to the last."""
        known = list(self.step_density.items()) if self.setting.ramped else []
        shown = known if len(known) <= STEPS_SHOWN else known[:: math.ceil(len(known) / (STEPS_SHOWN - 1))] + known[-1:]
        densities = ", ".join(f"{density:.4f} in step {step}" for step, density in dict(shown).items())
        return [f"density by step: {densities}"] if shown else []

    @property
    def kept_every_pair(self) -> bool:
        """Whether the sparse calls computed as many pairs as dense attention; False without any."""
        counted = [(layer.density, layer.sparse_calls) for layer in self.layers if layer.density is not None]
        pairs = sum(density * calls for density, calls in counted)
        return bool(counted) and pairs >= (1 - ROUNDING) * sum(calls for _, calls in counted)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers. An infinite or undefined number is a string."""
        totals = {
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "kept_every_pair": self.kept_every_pair,
        }
        cache = None if self.cache is None else self.cache.as_dict()
        record = dataclasses.asdict(self) | {"setting": self.setting.as_dict(), "cache": cache} | totals
        for layer in record["layers"]:
            for name in ("relative_error", "kept_mass"):
                if layer[name] is not None and not math.isfinite(layer[name]):
                    layer[name] = str(layer[name])  # JSON has neither nan nor inf
        return record

    def __str__(self) -> str:
        record = self.setting.as_dict()
        pairs = (f"{key}={value}" for key, value in record.get("config", {}).items())
        settings = "layer by layer" if "layers" in record else ", ".join(pairs)
        calls = f"{self.sparse_calls} sparse and {self.dense_calls} dense attention calls"
        lines = [f"{self.setting.method}({settings}): {calls}"]
        lines += [f"  {NOTHING_GAINED}"] if self.kept_every_pair and self.cache is None else []
        lines += [f"  {text}" for text in (*self._grid_lines(), *self._step_lines())]
        for transformer, count in self.calls.items():
            layers = [layer for layer in self.layers if layer.transformer == transformer]
            lines.append(f"  {transformer}: {len(layers)} layers, {count} {'call' if count == 1 else 'calls'}")
            lines += [f"    {'layers' if '-' in span else 'layer'} {span}: {text}" for span, text in _grouped(layers)]
        lines += [] if self.cache is None else [f"  {line}" for line in self.cache.lines()]
        lines += [f"  {transformer}: {traffic}" for transformer, traffic in self.traffic.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _grid_lines(self) -> list[str]:
        """The density on each grid; of many grids the first ones, and the range of the others."""
        known = list(self.grids.items())
        shown = known if len(known) <= GRIDS_SHOWN else known[: GRIDS_SHOWN - 1]
        lines = [
            f"grid {grid}: density {'from calls' if density is None else f'{density:.4f}'}" for grid, density in shown
        ]
        if others := known[len(shown) :]:
            densities = [density for _, density in others if density is not None]
            span = f"density {min(densities):.4f} to {max(densities):.4f}" if densities else "density from calls"
            lines.append(f"and {len(others)} more grids: {span}")
        return lines

    def __repr__(self) -> str:
        return f"Report({self.setting.text}: {self.sparse_calls} sparse and {self.dense_calls} dense attention calls)"

    def _repr_html_(self) -> str:
        """A table for notebooks: the layers that did the same are one row."""
        rows = [("transformer", "layers", "calls of attention")]
        for transformer in self.calls:
            layers = [layer for layer in self.layers if layer.transformer == transformer]
            rows += [(transformer, span, text) for span, text in _grouped(layers)]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        cells[0] = cells[0].replace("td>", "th>")
        gained = [NOTHING_GAINED] if self.kept_every_pair and self.cache is None else []
        cached = [] if self.cache is None else self.cache.lines()
        remarks = [repr(self), *gained, *self._grid_lines(), *self._step_lines(), *cached, *self.notes]
        lines = "<br>".join(map(html.escape, remarks))
        return f"<p>{lines}</p><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _grouped(layers: list[LayerReport]) -> list[tuple[str, str]]:
    """Neighbouring layers that did the same: their indices, and what they did."""
    numbered = enumerate(layer.describe() for layer in layers)
    groups = []
    for text, group in itertools.groupby(numbered, key=lambda pair: pair[1]):
        indices = [index for index, _ in group]
        groups.append((f"{indices[0]}" if len(indices) == 1 else f"{indices[0]}-{indices[-1]}", text))
    return groups


class Tally:
    """Counts the calls of one layer."""

    def __init__(self) -> None:
        self._sparse: Counter[tuple[int | None, float | None]] = Counter()
        self._measured: dict[int | None, torch.Tensor] = {}
        self._kernels: dict[str, str] = {}
        self._dense: Counter[str] = Counter()
        self._permuted: Counter[str] = Counter()
        self._kept_bytes = 0

    def keep(self, values: Mapping[int, Iterable[Any]]) -> None:
        """Note the size of what a layer keeps between steps, records with tensors."""
        tensors = (part for record in values.values() for part in record if isinstance(part, torch.Tensor))
        self._kept_bytes = max(self._kept_bytes, sum(part.nbytes for part in tensors))

    def sparse(self, density: float | None, kernel: str, why: str, step: int | None = None) -> None:
        """Count a call. `density` is the plan's, None if it is measured; `step` if plans differ by step."""
        self._sparse[step, density] += 1
        self._kernels[kernel] = why

    def permuted(self, where: str) -> None:
        """Count a sparse call along a curve, as in `LayerReport.permuted`."""
        self._permuted[where] += 1

    def measure(self, step: int | None, density_sum: torch.Tensor) -> None:
        """Add densities summed on the device to a step's sum, without waiting for the device.

        Args:
            step: of the calls; None if unknown.
            density_sum: as in `PlanArguments`; it is 0 afterwards.
        """
        with torch.inference_mode(False):
            if step in self._measured:
                self._measured[step] += density_sum.to(self._measured[step].device)  # of an earlier run, elsewhere
            else:
                self._measured[step] = density_sum.clone()
            density_sum.zero_()

    def dense(self, reason: str) -> None:
        self._dense[reason] += 1

    def totals(self) -> dict[str, Any]:
        """The counted fields of a `LayerReport`."""
        measured: dict[int | None, tuple[float, float]]
        measured = {step: tuple(tensor.tolist()) for step, tensor in self._measured.items()}
        planned = [(step, density * n, n) for (step, density), n in self._sparse.items() if density is not None]
        densities = list(measured.values()) or [(total, count) for _, total, count in planned]
        density = sum(total for total, _ in densities) / sum(count for _, count in densities) if densities else None
        measured = measured or {step: (total, count) for step, total, count in planned if step is not None}
        return {
            "sparse_calls": self._sparse.total(),
            "dense_calls": self._dense.total(),
            "density": density,
            "step_density": {step: total / count for step, (total, count) in measured.items() if step is not None},
            "kernels": dict(self._kernels),
            "dense_reasons": dict(self._dense),
            "permuted": dict(self._permuted),
            "kept_bytes": self._kept_bytes,
        }
