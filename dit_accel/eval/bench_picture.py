"""The picture of a benchmark: speed-up against density, beside the line of what could be reached."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError

SIZE = (7.0, 5.0)  # inches


def check_matplotlib() -> None:
    """See before the work that a picture can be drawn.

    Raises:
        DitAccelError: matplotlib is not installed; the message has the command.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DitAccelError("A picture needs matplotlib, which is not installed: pip install 'dit_accel[plot]'.")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the rows' speed-ups: a line for each operator, shape, dtype and direction.

    The ideal line is 1 / density, the speed-up if every kept pair cost what it costs the dense baseline.

    Args:
        rows: as `bench.measure` makes them.
        path: where to.

    Raises:
        DitAccelError: matplotlib is not installed, or there are no rows.
    """
    check_matplotlib()
    if not rows:
        raise DitAccelError("There are no rows to draw.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="density", ylabel="speed-up over dense attention")
    lowest = min(row["density"] for row in rows)
    axes.plot([lowest, 1], [1 / lowest, 1], color="gray", linestyle="--", label="ideal: 1 / density")
    axes.axhline(1, color="lightgray", linewidth=1, zorder=0)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        lines[_label(row, rows)].append((row["density"], row["speedup"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    place = {row["gpu"] or row["cpu"] for row in rows}
    axes.set_title(", ".join(sorted(place)), fontsize="small")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize="x-small")
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(path, format="png", dpi=150)


def _label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What tells a row's line from the others: the operator, and the rest where rows differ in it."""
    differing = [name for name in ("shape", "dtype", "direction", "impl") if len({other[name] for other in rows}) > 1]
    return " ".join(str(row[name]) for name in ("op", *differing))
