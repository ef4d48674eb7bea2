"""The fields of a summary, and the formatting of its numbers.

    title     str
    made      its origin: {"command": str, "model": str, "seeds": [..], "prompts": [..], "hardware": str, ...};
              values are strings, numbers, lists, or dicts of these, and the report shows all of them
    metrics   [{"name", "title", "unit", "better": "higher" | "lower", "about": one line}]
    rows      [{"label", "method", "config", "command", "density", "speedup", "speedup_interval": [low, high],
              "attention_speedup", "loop_seconds": {"p50", "p95"}, "attention_seconds": the same, "peak_bytes", "steps",
              "guidance", "figures": {metric's name: {"value", "interval": [low, high], "samples"}}}]; None for what was
              not measured; the first row is the untouched pipeline. Attention is that of the modules: permutations
              of tokens at blocks are not in it
    verdict   [{"text", "row": label, "command"}]; the last two where the text names a setting
    samples   [{"row": label, "prompt", "seed", "media": path, "figures": {metric's name: number}}]
    masks     [{"row": label, "image": path}]
    attention [{"row": label, **dit_accel.eval.attention.AttentionRecord.as_json()}]

Intervals hold 95 % of the bootstrap over prompts. JSON knows no infinity: a perfect PSNR is the string "inf". Paths are
relative to the report's folder.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

NONE = "–"
NO_CACHE = "uncached"
PERCENT = "%"  # the one unit that figures of a table have beside them


def written(value: float | str | None, unit: str = "", digits: int = 4) -> str:
    """A figure as text: four significant digits, a percentage with one decimal, ∞ for infinity, a dash for none."""
    if value is None:
        return NONE
    value = float(value)  # of "inf", too
    if unit == PERCENT:
        return f"{value:.1f} {PERCENT}"
    text = ("−" if value < 0 else "") + ("∞" if math.isinf(value) else f"{abs(value):#.{digits}g}".rstrip("."))
    return f"{text} {unit}".rstrip()


def interval(ends: Sequence[float | str] | None, form: str = " (95 %: {} to {})") -> str:
    """An interval as text; empty without one, or with equal ends."""
    low, high = ("", "") if ends is None else (written(end, digits=3) for end in ends)
    return "" if low == high else form.format(low, high)


def seconds(times: dict[str, float] | None) -> str:
    """Median and 95th percentile of a time."""
    return NONE if times is None else f"{written(times['p50'])} / {written(times['p95'])}"


def memory(count: int | None) -> str:
    """Bytes in GiB, or in MiB below one."""
    if count is None:
        return NONE
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def times(factor: float | None) -> str:
    """A speed-up."""
    return NONE if factor is None else f"{factor:.2f}×"


def share(part: float | None) -> str:
    """A density."""
    return written(None if part is None else 100 * part, PERCENT)


def value_of(row: dict[str, Any], metric: dict[str, Any]) -> float | None:
    """A row's figure, None where it is missing."""
    value = row["figures"].get(metric["name"], {}).get("value")
    return None if value is None else float(value)


def cell(value: float | str | None, metric: dict[str, Any]) -> str:
    """A metric's figure below its `heading`."""
    return written(value, PERCENT if metric["unit"] == PERCENT else "")


def arrow(metric: dict[str, Any]) -> str:
    """The direction of better values."""
    return "↑" if metric["better"] == "higher" else "↓"


def heading(metric: dict[str, Any]) -> str:
    """A metric's column heading: its title, unit and the better direction. Percentages have the unit beside them."""
    unit = f" ({metric['unit']})" if metric["unit"] not in ("", PERCENT) else ""
    return f"{metric['title']}{unit} {arrow(metric)}"


def names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Short names of rows by label: the method, with a setting that tells it from others of that method."""
    parts = {row["label"]: re.split(r"[:,\s]+", row["label"]) for row in rows}
    shortened = {}
    for label, (method, *settings) in parts.items():
        others = [set(rest) for other, (name, *rest) in parts.items() if name == method and other != label]
        telling = [setting for setting in settings if not any(setting in rest for rest in others)]
        shortened[label] = " ".join([method, *(telling[:1] or settings if others else [])])
    return shortened


def crossed(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The method with its schedule, and the step cache, of each row by label; the baseline is "dense" without a cache.

    Empty unless the rows are a grid: at least two caches, no cache among them, have several methods each.
    """
    cells = {}
    for row in rows:
        method, _, cache = row["label"].partition(" cache=")
        cells[row["label"]] = "dense" if row is rows[0] else method, cache or NO_CACHE
    methods = Counter(cache for _, cache in set(cells.values()))
    return cells if sum(count > 1 for count in methods.values()) > 1 and len(set(cells.values())) == len(rows) else {}


def titles(cells: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Short names of the methods and of the caches that `crossed` found, in the order of the rows."""
    parts = (dict.fromkeys(part) for part in zip(*cells.values(), strict=True))
    return [names([{"label": name} for name in part]) for part in parts]


def front(rows: list[dict[str, Any]], metric: dict[str, Any]) -> list[str]:
    """Labels on the Pareto front of speed-up and a metric, fastest last.

    Rows without a figure or a speed-up are left out.
    """
    sign = 1 if metric["better"] == "higher" else -1
    points = [
        (row["speedup"], sign * value, row["label"])
        for row in rows
        if (value := value_of(row, metric)) is not None and row["speedup"] is not None
    ]
    numbers = fronts([point[:2] for point in points])
    front = [point for point, number in zip(points, numbers, strict=True) if number == 0]
    return [label for _, _, label in sorted(front, key=lambda point: point[0])]


def fronts(points: Sequence[tuple[float, float]]) -> list[int]:
    """The front of each point: 0 where no other is as good in both figures and better in one, 1 without those, etc."""
    numbers: dict[int, int] = {}
    while len(numbers) < len(points):
        left = [index for index in range(len(points)) if index not in numbers]
        number = max(numbers.values(), default=-1) + 1
        numbers |= {one: number for one in left if not any(_dominates(points[other], points[one]) for other in left)}
    return [numbers[index] for index in range(len(points))]


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(map(operator.ge, one, other))


def sampled_otherwise(summary: dict[str, Any]) -> list[str]:
    """A sentence for each row whose steps or guidance differ from the first one's."""
    steps = [(row.get("steps"), row.get("guidance")) for row in summary["rows"]]
    return [
        f"{row['label']} was made in {sampling[0]} steps with guidance {sampling[1]}, {summary['rows'][0]['label']} in "
        f"{steps[0][0]} with {steps[0][1]}"
        for row, sampling in zip(summary["rows"], steps, strict=True)
        if sampling != steps[0]
    ]
