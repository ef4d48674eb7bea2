"""Pictures of the report, drawn by matplotlib: Pareto fronts and heat maps of the attention's error.

As SVG they take the page's text colour, so they suit its light and its dark theme; as PNG they are black on white.
Points carry the numbers of the table's rows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_accel.eval.report import fields
from dit_accel.files import MARK
from dit_accel.generation.output import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour, which an SVG calls currentColor
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★", "X": "✖"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")  # Okabe and Ito
PANEL = (3.6, 2.9)  # inches: legible when a phone shows it at full width
FAR = 3  # quartile ranges beyond the quartiles; what lies farther is "far out" (Tukey 1977, section 2D)
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "dit_accel",  # equal summaries make equal files
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
}


def drawable(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of which at least one row beside the baseline has a finite figure and a speed-up."""
    return [metric for metric in summary["metrics"] if len(_points(summary, metric)) > 1]


def legend(summary: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, in the order of the rows."""
    methods = dict.fromkeys(row["method"] for row in summary["rows"])
    markers = list(MARKERS)
    return {
        method: (COLOURS[index % len(COLOURS)], markers[index % len(markers)]) for index, method in enumerate(methods)
    }


def pareto(summary: dict[str, Any]) -> bytes:
    """Speed-up against each metric as PNG, a panel each, with one legend; a line joins the rows on the front."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    metrics = drawable(summary)
    columns = min(3, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, metric in zip(axes, metrics, strict=False):
            _front_panel(axis, summary, metric)
        for axis in axes[len(metrics) :]:
            axis.set_axis_off()
        handles = [
            Line2D([], [], linestyle="", color=colour, marker=marker, label=method)
            for method, (colour, marker) in legend(summary).items()
        ]
        handles.append(Line2D([], [], color=INK, linewidth=1, alpha=0.5, label="Pareto front"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3 * columns, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120, metadata={"Comment": MARK})
        return file.getvalue()


def panel(summary: dict[str, Any], metric: dict[str, Any]) -> str:
    """One metric's Pareto front alone, as SVG without a legend."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=PANEL, layout="constrained")
        _front_panel(figure.subplots(), summary, metric)
        return _svg(figure)


def heat_maps(record: dict[str, Any]) -> str:
    """An entry of the summary's `attention` as SVG: layers × steps (means over heads) above layers × heads."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    layers = [_short(name) for name in record["layers"]]
    heads = max((len(cell) for line in record["error"] for cell in line if cell), default=1)
    with matplotlib.rc_context(STYLE):
        tall = min(12.0, 1.1 + 0.24 * len(layers))
        figure = Figure(figsize=(7.2, 2 * tall), layout="constrained")
        axes = figure.subplots(2, 2)
        titles = (("error", "relative error", "magma_r", None), ("mass", "softmax mass kept", "viridis", 1.0))
        for column, (name, title, colours, top) in enumerate(titles):
            shades = matplotlib.colormaps[colours].with_extremes(bad=(0.5, 0.5, 0.5, 0.15))  # dense: not measured
            empty = [math.nan] * heads
            values = np.array([[cell or empty for cell in line] for line in record[name]], dtype=float)  # [L, S, H]
            both = (_mean(values, 2), record["steps"], "step"), (_mean(values, 1), range(heads), "head")
            for row, (grid, ticks, label) in enumerate(both):
                axis = axes[row, column]
                image = axis.imshow(grid, aspect="auto", cmap=shades, vmin=0, vmax=top, interpolation="nearest")
                axis.set(title=title, xlabel=label, ylabel="layer")
                axis.set_xticks(*_some(ticks, 10))
                axis.set_yticks(*_some(layers, 24))
                figure.colorbar(image, ax=axis).outline.set_visible(False)
        return _svg(figure)


def _some(names: Sequence[Any], most: int) -> tuple[list[int], list[Any]]:
    """Places and names of at most `most` ticks, evenly spread."""
    places = range(0, len(names), -(-len(names) // most))
    return list(places), [names[place] for place in places]


def _mean(values: Any, axis: int) -> Any:
    """Mean over an axis without NaN; NaN where there is nothing else."""
    import numpy as np

    return np.ma.masked_invalid(values).mean(axis).filled(math.nan)


def _short(name: str) -> str:
    """A layer's name without what all of them share: "transformer.blocks.3.attn1" is "blocks.3"."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[max(0, last - 1) : last + 1])


def _points(summary: dict[str, Any], metric: dict[str, Any]) -> list[tuple[float, float, int, dict[str, Any]]]:
    """(speed-up, value, number, row) of all rows that can be drawn: infinities cannot."""
    return [
        (row["speedup"], value, number, row)
        for number, row in enumerate(summary["rows"], 1)
        if row["speedup"] is not None and (value := fields.value_of(row, metric)) is not None and math.isfinite(value)
    ]


def _front_panel(axes: Axes, summary: dict[str, Any], metric: dict[str, Any]) -> None:
    points = _points(summary, metric)
    across, up = _limits([point[0] for point in points] + [1.0]), _limits([point[1] for point in points])
    on_front = set(fields.front(summary["rows"], metric))
    line = sorted((speed, value) for speed, value, _, row in points if row["label"] in on_front)
    axes.plot([speed for speed, _ in line], [value for _, value in line], color=INK, linewidth=1, alpha=0.5, zorder=1)
    marks, texts = legend(summary), dict[tuple[float, float], list[str]]()
    wide, high = (0.02 * (ends[1] - ends[0]) for ends in (across, up))  # points that are nearer share a label
    for speed, value, number, row in points:
        colour, marker = marks[row["method"]]
        x, y = min(max(speed, across[0]), across[1]), min(max(value, up[0]), up[1])
        far = [fields.times(speed)] if x != speed else []
        far += [fields.written(value, digits=3)] if y != value else []  # drawn on the edge, hollow, with its figure
        fill = "none" if far else colour
        axes.plot(x, y, linestyle="", color=colour, marker=marker, markerfacecolor=fill, zorder=2, clip_on=False)
        near = next((at for at in texts if abs(at[0] - x) < wide and abs(at[1] - y) < high), (x, y))
        texts.setdefault(near, []).append(": ".join([str(number), *far]))
    for (x, y), labels in texts.items():
        below, left = y > up[1] - 0.05 * (up[1] - up[0]), x > across[1] - 0.1 * (across[1] - across[0])
        side: dict[str, Any] = {"xytext": (-4 if left else 4, -8 if below else 2), "ha": "right" if left else "left"}
        axes.annotate(", ".join(labels), (x, y), textcoords="offset points", fontsize=7, zorder=3, **side)
    axes.axvline(1, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    better = f"{metric['unit']}   {fields.arrow(metric)} better".strip()
    axes.set(xlim=across, ylim=up, xlabel="speed-up of the denoising loop", ylabel=better, title=metric["title"])
    axes.spines[["top", "right"]].set_visible(False)


def _limits(values: list[float]) -> tuple[float, float]:
    """Ends of an axis with a margin, without what is far out from the rest."""
    import numpy as np

    low, high = np.quantile(values, (0.25, 0.75))
    reach = FAR * (high - low)
    near = [value for value in values if low - reach <= value <= high + reach]
    margin = 0.08 * (max(near) - min(near)) or 0.05 * abs(near[0]) or 0.05
    return min(near) - margin, max(near) + margin


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
