"""The summary as Markdown: the table, what is missing, and how it was made."""

from __future__ import annotations

from typing import Any

from dit_accel.eval.report import fields


def render(summary: dict[str, Any]) -> str:
    """`summary.md`, as `fields.py` describes a summary."""
    parts = [f"# {summary['title']}", table(summary)]
    parts += [f"{remark}." for remark in fields.sampled_otherwise(summary)]
    gaps = fields.missing(summary)
    if gaps:
        parts.append("Not measured:\n\n" + "\n".join(f"* {gap}" for gap in gaps))
    parts.append("![Pareto fronts](pareto.png)")
    about = "\n".join(f"* {fields.heading(metric)}: {metric['about']}" for metric in summary["metrics"])
    parts.append(f"## Figures\n\n{about}")
    made = "\n".join(f"* {name}: {plain(value)}" for name, value in summary["made"].items())
    parts.append(f"## How it was made\n\n{made}")
    return "\n\n".join(parts) + "\n"


def excerpt(summary: dict[str, Any], label: str) -> str:
    """One method beside the reference, without headings: the table, what is missing, and how it was made."""
    rows = [row for row in summary["rows"] if row["reference"] or row["label"] == label]
    parts = [table(summary | {"rows": rows})]
    parts += [f"{remark}." for remark in fields.sampled_otherwise(summary | {"rows": rows})]
    parts += [f"Not measured: {gap}." for gap in fields.missing(summary)]
    made = summary["made"]
    prompts, seeds = len(made["prompts"]), len(made["seeds"])
    parts.append(
        f"{prompts} prompts with {seeds} seeds each, {made['size']}, {made['steps']} steps, guidance "
        f"{plain(made['guidance'])}; {plain(made['hardware'])}; {made['date']}. Made by `{plain(made['command'])}`."
    )
    return "\n\n".join(parts)


def table(summary: dict[str, Any], costs: bool = True) -> str:
    """All rows with density, speed-up and every metric; `costs` adds times and memory."""
    metrics = summary["metrics"]
    head = ["method", "density", "speed-up"]
    head += ["loop p50 / p95 (s)", "attention p50 / p95 (s)", "memory"] if costs else []
    head += [fields.heading(metric) for metric in metrics]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in summary["rows"]:
        cells = [f"`{row['label']}`", fields.share(row["density"]), fields.times(row["speedup"])]
        if costs:
            cells += [fields.seconds(row.get("loop_seconds")), fields.seconds(row.get("attention_seconds"))]
            cells += [fields.memory(row.get("peak_bytes"))]
        lines.append(cells + [fields.written(fields.value_of(row, metric)) for metric in metrics])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def plain(value: Any) -> str:
    """A value of `made` on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return fields.NONE if value is None else " ".join(str(value).split())
