"""The summary as Markdown: the verdict, the table, and how it was made."""

from __future__ import annotations

from typing import Any

from dit_accel.eval.report import fields, published
from dit_accel.files import MARK

LEGEND = "↑ more is better, ↓ less is better. Intervals hold 95 % of the bootstrap over prompts."


def render(summary: dict[str, Any]) -> str:
    """`summary.md`, as `fields.py` describes a summary."""
    parts = [f"# {summary['title']}"]
    if summary.get("verdict"):
        advice = (
            f"* {line['text']}" + (f"\n  `{line['command']}`" if line.get("command") else "")
            for line in summary["verdict"]
        )
        parts.append("## What to use\n\n" + "\n".join(advice))
    parts += ["## Figures", table(summary), LEGEND]
    parts += [f"{remark}." for remark in fields.sampled_otherwise(summary)]
    if lines := published.table(summary):
        parts += ["## Published figures", _grid([lines[0], ["---"] * len(lines[0]), *lines[1:]]), published.ABOUT]
    parts.append("![Pareto fronts](pareto.png)")
    parts.append("\n".join(f"* {fields.heading(metric)}: {metric['about']}" for metric in summary["metrics"]))
    origin = "\n".join(f"* {name}: {plain(value)}" for name, value in summary["made"].items())
    parts.append(f"## How it was made\n\n{origin}")
    parts.append(f"<!-- {MARK} -->")
    return "\n\n".join(parts) + "\n"


def excerpt(summary: dict[str, Any], label: str) -> str:
    """One method beside the baseline, without headings: the table, and how it was made."""
    rows = [row for index, row in enumerate(summary["rows"]) if index == 0 or row["label"] == label]
    parts = [table(summary | {"rows": rows})]
    parts += [f"{remark}." for remark in fields.sampled_otherwise(summary | {"rows": rows})]
    origin = summary["made"]
    prompts, seeds = len(origin["prompts"]), len(origin["seeds"])
    parts.append(
        f"{prompts} prompts with {seeds} seeds each, {origin['size']}, {origin['steps']} steps, guidance "
        f"{plain(origin['guidance'])}; {plain(origin['hardware'])}; {origin['date']}. "
        f"Made by `{plain(origin['command'])}`."
    )
    return "\n\n".join(parts)


def table(summary: dict[str, Any], costs: bool = True) -> str:
    """All rows: density, speed-up, metrics; with `costs` times, memory, intervals too."""
    metrics = summary["metrics"]
    head = ["method", "density", "speed-up"]
    head += ["loop p50 / p95 (s)", "attention p50 / p95 (s)", "memory"] if costs else []
    head += [fields.heading(metric) for metric in metrics]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    span = " ({} to {})" if costs else ""
    for row in summary["rows"]:
        speed = fields.times(row["speedup"]) + fields.interval(row.get("speedup_interval"), span)
        cells = [f"`{row['label']}`", fields.share(row["density"]), speed]
        if costs:
            cells += [fields.seconds(row.get("loop_seconds")), fields.seconds(row.get("attention_seconds"))]
            cells += [fields.memory(row.get("peak_bytes"))]
        for metric in metrics:
            figure = row["figures"].get(metric["name"], {})
            cells.append(fields.cell(figure.get("value"), metric) + fields.interval(figure.get("interval"), span))
        lines.append(cells)
    return _grid(lines)


def _grid(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def plain(value: Any) -> str:
    """A value of `made` on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return fields.NONE if value is None else " ".join(str(value).split())
