"""Reading files of measured rows, and drawing speed-up against density."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, whole
from dit_accel.generation.output import check_matplotlib

PANEL = (4.5, 4.5)  # inches
KEYS = ("op", "shape", "dtype", "direction")
MARKERS, STYLES = "osD^vP*Xph<>", ("-", "--", ":")


def read(path: Path, field: str = "op") -> list[dict[str, Any]]:
    """All rows of a file, without an incomplete last line; each has that field.

    Raises:
        DitAccelError: the file cannot be read, or a line is not a row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DitAccelError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = []
    for number, line in enumerate(content[: whole(content)].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DitAccelError(f"{path}, line {number}, is not JSON ({error}). Restore the line.") from error
        if not isinstance(row, dict) or field not in row:
            raise DitAccelError(f"{path}, line {number}, is not a row that `dit-accel bench` wrote.")
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of operators' speed-ups: a panel a direction; colours are operators, markers shapes, lines dtypes.

    A line connects the fastest rows at each density. The ideal line is 1 / density, the speed-up at the dense
    baseline's cost of a pair.
    """
    check_matplotlib()
    if not rows:
        raise DitAccelError("There are no rows to draw.")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    ops, shapes, dtypes, directions = (list(dict.fromkeys(row[name] for row in rows)) for name in KEYS)
    colour = {op: colormaps["tab20"](2 * i % 20 + i // 10 % 2) for i, op in enumerate(ops)}  # the ten dark ones first
    marker = {shape: MARKERS[i % len(MARKERS)] for i, shape in enumerate(shapes)}
    style: dict[str, Any] = {dtype: STYLES[i % len(STYLES)] for i, dtype in enumerate(dtypes)}
    figure = Figure(figsize=(PANEL[0] * len(directions) + 2, PANEL[1]), layout="constrained")
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    lowest = min(row["density"] for row in rows)
    for panel, direction in zip(panels, directions, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="density", title=direction)
        panel.plot([lowest, 1], [1 / lowest, 1], color="gray", linewidth=1)
        panel.axhline(1, color="lightgray", linewidth=1, zorder=0)
        lines: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row["direction"] == direction:
                lines[row["op"], row["shape"], row["dtype"]].append((row["density"], row["speedup"]))
        for (op, shape, dtype), points in lines.items():
            fastest = dict(sorted(points))  # of one density the fastest is the last
            panel.plot(*zip(*fastest.items(), strict=True), color=colour[op], linestyle=style[dtype], linewidth=1)
            panel.plot(*zip(*points, strict=True), color=colour[op], linestyle="", marker=marker[shape], markersize=4)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("speed-up over dense attention")
    figure.suptitle(", ".join(sorted({row["gpu"] or row["cpu"] for row in rows})), fontsize="small")
    legend = [Line2D([], [], color=colour[op], label=op) for op in ops]
    legend += [Line2D([], [], color="black", linestyle="", marker=marker[shape], label=shape) for shape in shapes]
    legend += [Line2D([], [], color="black", linestyle=style[dtype], label=dtype) for dtype in dtypes]
    legend += [Line2D([], [], color="gray", linewidth=1, label="ideal: 1 / density")]
    figure.legend(handles=legend, loc="outside right center", fontsize="small")
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(path, format="png", dpi=100, metadata={"Comment": MARK})
