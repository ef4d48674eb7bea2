"""The verdict of an evaluation: the best setting under each limit, with its command.

A setting is a candidate if it attends to fewer pairs than dense attention or has a step cache, and the 95 % interval of
its speed-up lies above 1. Without limits the verdict has two answers: the fastest candidate within 1 dB of the best,
and the best one at least 1.5 times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dit_accel.eval import gates
from dit_accel.eval.gates import Limit
from dit_accel.eval.report import fields

WITHIN = 1.0  # dB
SPEED = 1.5
Row = dict[str, Any]
Line = dict[str, Any]  # "text"; if it names a setting, also its "row" and "command"


def decide(rows: Sequence[Row], metrics: Sequence[dict[str, Any]], limits: Sequence[Limit], tokens: int) -> list[Line]:
    """The verdict on the rows of a summary, a line for each question; `tokens` are those of the attention."""
    main = main_metric(metrics)
    sure = {row["label"]: (row.get("speedup_interval") or [row["speedup"]])[0] for row in rows}
    gaining = [row for row in rows[1:] if _saves(row) and sure[row["label"]] > 1]
    if not gaining:
        return [{"text": _nothing_gains(rows, tokens)}]
    if limits:
        questions = [*([limit] for limit in limits), *([list(limits)] if len(limits) > 1 else [])]
        return [_under(chosen, gaining, main) for chosen in questions]
    if main is None:
        return [_line("The fastest", _fastest(gaining), None)]
    lines = []
    if main["unit"] == "dB":
        best = max(goodness(row, main) for row in gaining)
        near = [row for row in gaining if goodness(row, main) >= best - WITHIN]
        lines.append(_line(f"The fastest within {WITHIN:g} dB of the best", _fastest(near), main))
    return [*lines, _under([Limit("speedup", ">=", SPEED)], gaining, main)]


def main_metric(metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The one that decides which setting is better: the first in dB, or else the first."""
    return next((metric for metric in metrics if metric["unit"] == "dB"), metrics[0] if metrics else None)


def _under(limits: Sequence[Limit], gaining: Sequence[Row], main: dict[str, Any] | None) -> Line:
    """The best row that holds the limits: the fastest, or by the main metric if they ask for speed alone."""
    said = " and ".join(map(str, limits))
    holding = [row for row in gaining if not gates.broken(limits, {"": gates.figures_of(row)})]
    if not holding:
        return {"text": f"No setting that gains holds {said}; the fastest is {_figures(_fastest(gaining), main)}."}
    if main is not None and all(limit.figure in gates.FIGURES for limit in limits):
        best = max(holding, key=lambda row: (goodness(row, main), row["speedup"]))
        return _line(f"The best with {said}", best, main)
    return _line(f"The fastest with {said}", _fastest(holding), main)


def _saves(row: Row) -> bool:
    return row["density"] < 1 or row["cache"] is not None


def _fastest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row["speedup"])


def goodness(row: Row, metric: dict[str, Any]) -> float:
    """A figure with the sign that makes more better; a missing one is the worst."""
    value = fields.value_of(row, metric)
    return -math.inf if value is None else value if metric["better"] == "higher" else -value


def _line(question: str, row: Row, main: dict[str, Any] | None) -> Line:
    return {"text": f"{question}: {_figures(row, main)}.", "row": row["label"], "command": row.get("command")}


def _figures(row: Row, main: dict[str, Any] | None) -> str:
    """The label with speed-up and main figure, each with its interval."""
    parts = [f"{row['speedup']:.2f} times as fast{fields.interval(row.get('speedup_interval'))}"]
    if main is not None:
        figure = row["figures"][main["name"]]
        value = fields.written(figure["value"], main["unit"])
        parts.append(f"{main['title']} {value}{fields.interval(figure.get('interval'))}")
    return f"{row['label']}, {', '.join(parts)}"


def _nothing_gains(rows: Sequence[Row], tokens: int) -> str:
    """That nothing gains, and the number of tokens from which something would.

    Let a method's attention take A' seconds and the rest of its loop R', the baseline's A and R. With s times the
    tokens they take A' s² + R' s and A s² + R s. So the method gains from s = (R' - R) / (A - A').
    """
    saving = [row for row in rows[1:] if _saves(row)]
    if not saving:
        return "No setting attends to fewer pairs than dense attention, or leaves steps out."
    fastest, base = _fastest(saving), rows[0]
    sparse = [row for row in saving if row["density"] < 1]
    first = "The fastest is" if fastest["speedup"] > 1 else "The fastest is dense attention, and next comes"
    said = f"No setting is surely faster than dense at {tokens:,} tokens. {first} {_figures(fastest, None)}."
    if not sparse:
        return said
    if base["attention_seconds"] is None:
        return f"{said} Without --compile, the verdict also estimates from how many tokens on one would be."
    timed = [row for row in (base, *sparse) if row["attention_seconds"]]
    attention = {row["label"]: row["attention_seconds"]["p50"] for row in timed}
    rest = {row["label"]: row["loop_seconds"]["p50"] - attention[row["label"]] for row in timed}
    lengths = {
        label: (rest[label] - rest[base["label"]]) / (attention[base["label"]] - seconds)
        for label, seconds in attention.items()
        if seconds < attention[base["label"]]
    }
    if not lengths:
        return f"{said} No setting's attention is faster than dense attention. Try a longer video or more sparsity."
    label = min(lengths, key=lambda name: lengths[name])
    if lengths[label] <= 1:
        return f"{said} The difference is within this run's noise. Take more prompts or a longer video."
    count = float(f"{lengths[label] * tokens:.1e}")  # two digits
    return f"{said} By these times {label} would gain from about {count:,.0f} tokens on."
