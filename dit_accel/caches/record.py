"""What a step cache did: by transformer, guidance branch and step, computed or skipped."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch


@dataclasses.dataclass
class BranchReport:
    """The calls of one guidance branch.

    Attributes:
        transformer: name of the pipeline's component.
        branch: as the pipeline names it in `cache_context`; else ``call 0``, ``call 1`` by the order within a step.
        computed, skipped: calls in which the cache skipped nothing, and others, of all runs.
        steps: of the last run, by denoising step counted from 0: the share of self-attention layers that ran beside the
            cache, 1 where it skipped nothing. A step of None: nothing told the step.
    """

    transformer: str
    branch: str
    computed: int = 0
    skipped: int = 0
    steps: dict[int | None, float] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        counted = [step for step in self.steps if step is not None]
        skipped = [step for step in counted if self.steps[step] < 1]
        ran = sorted({self.steps[step] for step in skipped})
        text = f"{self.transformer}, {self.branch}: {self.computed} calls computed, {self.skipped} skipped"
        if skipped:
            shares = " to ".join(f"{share:.0%}" for share in dict.fromkeys((ran[0], ran[-1])))
            text += f"; last run: {len(skipped)} of its {len(counted)} steps skipped, {spans(skipped)} "
            text += f"({shares} of the layers ran)"
        return text


@dataclasses.dataclass
class CacheReport:
    """A step cache's part of a report.

    Attributes:
        cache: the cache and its settings as typed.
        branches: its calls.
        kept_bytes: the most that it kept between calls, on the device of the activations.
        notes: further remarks, such as where MagCache's ratios come from.
        ratios: with ``calibrate``, MagCache's ratios by transformer and branch, one for each step of the last run; None
            for the steps of another transformer.
    """

    cache: str
    branches: list[BranchReport]
    kept_bytes: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    ratios: dict[str, dict[str, list[float | None]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def joined(cls, reports: Sequence[CacheReport]) -> CacheReport | None:
        """One report of a pipeline's transformers; None without any."""
        if not reports:
            return None
        branches = [branch for report in reports for branch in report.branches]
        notes = list(dict.fromkeys(note for report in reports for note in report.notes))
        ratios = {name: by_branch for report in reports for name, by_branch in report.ratios.items()}
        return cls(reports[0].cache, branches, sum(report.kept_bytes for report in reports), notes, ratios)

    @property
    def skipped(self) -> int:
        return sum(branch.skipped for branch in self.branches)

    @property
    def computed(self) -> int:
        return sum(branch.computed for branch in self.branches)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"computed": self.computed, "skipped": self.skipped}

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"step cache {self.cache}: {self.computed} calls computed, {self.skipped} skipped"]
        lines += [f"  {branch.describe()}" for branch in self.branches]
        if self.computed and not self.skipped:
            lines.append("  it skipped nothing: take a higher threshold, more steps or another cache")
        if self.kept_bytes:
            lines.append(f"  at most {self.kept_bytes:,} bytes kept between steps")
        return lines + [f"  note: {note}" for note in self.notes]


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as runs: ``3-5, 7``."""
    runs: list[str] = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in group]
        runs.append(f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(runs)


def size_of(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors within a value, each counted once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(size_of(part, seen) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(size_of(part, seen) for part in value)
    return 0
