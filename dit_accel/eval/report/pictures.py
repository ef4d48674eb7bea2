"""Pictures of the report, drawn by matplotlib: Pareto fronts and heat maps of the attention's error.

As SVG they take the page's text colour, so they suit its light and its dark theme; as PNG they are black on white.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.eval.report import fields
from dit_accel.generation.output import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour, which an SVG calls currentColor
MARKERS = "osD^vP*X"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")  # Okabe and Ito
PANEL = (3.6, 2.9)  # inches: legible when a phone shows it at full width
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

Kind = Literal["svg", "png"]


def drawable(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of which at least one row beside the reference has a finite figure and a speed-up."""
    return [metric for metric in summary["metrics"] if len(_points(summary, metric)) > 1]


def pareto(summary: dict[str, Any], kind: Kind) -> bytes:
    """Speed-up against each metric, a panel each; a line joins the rows on the front.

    Raises:
        DitAccelError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    metrics = drawable(summary)
    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    columns = 1 if kind == "svg" else min(3, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    with matplotlib.rc_context(STYLE):
        figure = _figure(PANEL[0] * columns, PANEL[1] * rows + 0.3)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, metric in zip(axes, metrics, strict=False):
            _front_panel(axis, summary, metric, methods)
        for axis in axes[len(metrics) :]:
            axis.set_axis_off()
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=3 * columns, frameon=False
            )
        return _bytes(figure, kind)


def panel(summary: dict[str, Any], metric: dict[str, Any]) -> bytes:
    """One metric's Pareto front alone, as SVG.

    Raises:
        DitAccelError: matplotlib is not installed.
    """
    return pareto({**summary, "metrics": [metric]}, "svg")


def heat_maps(record: dict[str, Any]) -> bytes:
    """Error and kept mass of one method as SVG: layers × steps (mean over heads) above layers × heads (over steps).

    Args:
        record: an entry of the summary's `attention`.

    Raises:
        DitAccelError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib
    import numpy as np

    layers = [_short(name) for name in record["layers"]]
    heads = max((len(cell) for line in record["error"] for cell in line if cell), default=1)
    with matplotlib.rc_context(STYLE):
        tall = min(12.0, 1.1 + 0.24 * len(layers))
        figure = _figure(7.2, 2 * tall)
        axes = figure.subplots(2, 2)
        titles = (("error", "relative error", "magma_r", None), ("mass", "softmax mass kept", "viridis", 1.0))
        for column, (name, title, colours, top) in enumerate(titles):
            empty = [math.nan] * heads
            values = np.array([[cell or empty for cell in line] for line in record[name]], dtype=float)  # [L, S, H]
            both = (_mean(values, 2), record["steps"], "step"), (_mean(values, 1), range(heads), "head")
            for row, (grid, ticks, label) in enumerate(both):
                _map(axes[row, column], grid, layers, list(ticks), title, label, colours, top)
        return _bytes(figure, "svg")


def _map(
    axes: Axes, grid: Any, layers: list[str], ticks: list[int], title: str, label: str, colours: str, top: float | None
) -> None:
    """One heat map of [layers, columns]; gaps are what was not measured, because it was dense."""
    import matplotlib

    shades = matplotlib.colormaps[colours].with_extremes(bad=(0.5, 0.5, 0.5, 0.15))
    image = axes.imshow(grid, aspect="auto", cmap=shades, vmin=0, vmax=top, interpolation="nearest")
    axes.set(title=title, xlabel=label, ylabel="layer")
    axes.set_xticks(*_some(ticks, 10))
    axes.set_yticks(*_some(layers, 24))
    bar = axes.figure.colorbar(image, ax=axes)
    bar.outline.set_visible(False)


def _some(names: Sequence[Any], most: int) -> tuple[list[int], list[Any]]:
    """Places and names of at most `most` ticks, evenly spread."""
    places = range(0, len(names), -(-len(names) // most))
    return list(places), [names[place] for place in places]


def _mean(values: Any, axis: int) -> Any:
    """Mean over an axis of what is there; NaN where nothing is."""
    import numpy as np

    there = ~np.isnan(values)
    count = there.sum(axis)
    return np.where(count > 0, np.where(there, values, 0).sum(axis) / np.maximum(count, 1), math.nan)


def _short(name: str) -> str:
    """A layer's name without what all of them share: "transformer.blocks.3.attn1" is "blocks.3"."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[max(0, last - 1) : last + 1])


def _points(summary: dict[str, Any], metric: dict[str, Any]) -> list[tuple[float, float, dict[str, Any]]]:
    """(speed-up, value, row) of all rows that can be drawn: infinities are not."""
    found = ((row["speedup"], fields.value_of(row, metric), row) for row in summary["rows"])
    return [
        (speed, value, row)
        for speed, value, row in found
        if speed is not None and value is not None and math.isfinite(value)
    ]


def _front_panel(axes: Axes, summary: dict[str, Any], metric: dict[str, Any], methods: list[str]) -> None:
    points = _points(summary, metric)
    on_front = set(fields.front(summary["rows"], metric))
    line = sorted((speed, value) for speed, value, row in points if row["label"] in on_front)
    if line:
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, alpha=0.5, zorder=1, label="Pareto front")
    for index, method in enumerate(methods):
        own = [(speed, value) for speed, value, row in points if row["method"] == method]
        if own:
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*own, strict=True), linestyle="", color=colour, marker=marker, label=method, zorder=2)
    axes.axvline(1, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    axes.set(xlabel="speed-up of the denoising loop", ylabel=_scale(metric), title=metric["title"])
    axes.spines[["top", "right"]].set_visible(False)


def _scale(metric: dict[str, Any]) -> str:
    """An axis label: the unit, and which way is better."""
    return f"{metric['unit']}   {fields.arrow(metric)} better".strip()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_canvas(FigureCanvasAgg(figure))
    return figure


def _bytes(figure: Figure, kind: Kind) -> bytes:
    file = io.BytesIO()
    if kind == "png":
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    return text[text.index("<svg") :].replace(INK, "currentColor").encode()
