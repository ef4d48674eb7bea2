"""Pictures of the report, drawn by matplotlib: Pareto fronts and heat maps of the attention's error.

As SVG they take the page's text colour, so they suit its light and its dark theme; as PNG they are black on white.
A point has its row's short name (`fields.names`). If step caches are crossed with methods (`fields.crossed`), a legend
names each method's marker and each cache's colour instead, and a line joins the points of each cache.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_accel.eval.report import fields
from dit_accel.files import MARK
from dit_accel.generation.output import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    Panel = tuple[Axes, list[tuple[float, float, str]]]  # and its points' places with their names

INK = "#010203"  # stands for the page's text colour, which an SVG calls currentColor
MARKERS = "osD^vP*X"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")  # Okabe and Ito
PANEL = (3.6, 2.9)  # inches: legible when a phone shows it at full width
LARGE = 2  # times as wide and high is the first panel
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a point, where its name may stand
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
    """The metrics of which at least two rows have a figure and a speed-up, one of them a finite figure."""
    points = ((metric, [value for _, value, _ in _points(summary, metric)]) for metric in summary["metrics"])
    return [metric for metric, values in points if len(values) > 1 and any(map(math.isfinite, values))]


def marks(summary: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row by label, both its method's; if caches are crossed, the colour is its cache's."""
    rows, crossed = summary["rows"], fields.crossed(summary["rows"])
    cells = {row["label"]: crossed.get(row["label"], (row["method"], row["method"])) for row in rows}
    methods, caches = (list(dict.fromkeys(parts)) for parts in zip(*cells.values(), strict=True))
    return {
        label: (COLOURS[caches.index(cache) % len(COLOURS)], MARKERS[methods.index(method) % len(MARKERS)])
        for label, (method, cache) in cells.items()
    }


def pareto(summary: dict[str, Any]) -> bytes:
    """Speed-up against each metric as PNG, a panel each, the first large; a line joins the rows on the front."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    metrics = drawable(summary)
    others = metrics[1:]
    beside = others[:LARGE]  # the large panel takes as many rows and columns; the others follow in lines of three
    columns = LARGE + bool(beside)
    rows = LARGE + -(-len(others[LARGE:]) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), layout="constrained")
        grid = figure.add_gridspec(rows, columns)
        places = [grid[:LARGE, :LARGE], *(grid[row, LARGE] for row in range(len(beside)))]
        places += [grid[LARGE + index // columns, index % columns] for index in range(len(others[LARGE:]))]
        panels = [
            _front_panel(figure.add_subplot(place), summary, metric)
            for place, metric in zip(places, metrics, strict=False)
        ]
        _legend(figure, summary)
        _name_points(figure, panels)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120, metadata={"Comment": MARK})
        return file.getvalue()


def panel(summary: dict[str, Any], metric: dict[str, Any]) -> str:
    """One metric's Pareto front alone, as SVG; that of the first one is larger."""
    import matplotlib
    from matplotlib.figure import Figure

    first = metric["name"] == drawable(summary)[0]["name"]
    factor = LARGE if first else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(factor * PANEL[0], factor * PANEL[1]), layout="constrained")
        shown = _front_panel(figure.subplots(), summary, metric)
        if first and fields.crossed(summary["rows"]):
            _legend(figure, summary)
        _name_points(figure, [shown])
        return _svg(figure)


def _legend(figure: Figure, summary: dict[str, Any]) -> None:
    """Name the line of the front and, if caches are crossed with methods, each marker and each colour."""
    from matplotlib.lines import Line2D

    columns = [[Line2D([], [], color=INK, linewidth=1, alpha=0.5, label="Pareto front")]]
    crossed, looks = fields.crossed(summary["rows"]), marks(summary)
    for part, titles in enumerate(fields.titles(crossed)):
        of = {cell[part]: looks[label] for label, cell in crossed.items()}
        looks_of: list[dict[str, Any]] = [
            {"color": of[name][0]} if part else {"marker": of[name][1], "color": INK, "ls": ""} for name in titles
        ]
        columns.append(
            [Line2D([], [], label=title, **look) for title, look in zip(titles.values(), looks_of, strict=True)]
        )
    rows = max(map(len, columns))
    gap = Line2D([], [], linestyle="", label=" ")
    handles = [handle for column in columns for handle in (*column, *[gap] * (rows - len(column)))]  # column by column
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=len(columns))


def heat_maps(record: dict[str, Any]) -> str:
    """An entry of the summary's `attention` as SVG: layers × steps (means over heads) above layers × heads."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

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
                form = PercentFormatter(1.0) if name == "mass" else None
                figure.colorbar(image, ax=axis, format=form).outline.set_visible(False)
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


def _points(summary: dict[str, Any], metric: dict[str, Any]) -> list[tuple[float, float, dict[str, Any]]]:
    """(speed-up, value, row) of all rows with both; a value may be infinite."""
    return [
        (row["speedup"], value, row)
        for row in summary["rows"]
        if row["speedup"] is not None and (value := fields.value_of(row, metric)) is not None
    ]


def _front_panel(axes: Axes, summary: dict[str, Any], metric: dict[str, Any]) -> Panel:
    """Draw one panel without its points' names, and return them."""
    points = _points(summary, metric)
    finite = [value for _, value, _ in points if math.isfinite(value)]
    across, (low, high) = _limits([speed for speed, _, _ in points] + [1.0]), _limits(finite)
    top = high
    if len(finite) < len(points):  # infinities lie on a line above all others
        top += 0.12 * (high - low)
        axes.set_ylim(low, top)  # before the ticks, which follow the limits
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
        axes.axhline(top, color=INK, linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(
            "∞", (0, 1), (-7, 0), xycoords="axes fraction", textcoords="offset points", ha="right", va="center"
        )
    on_front = set(fields.front(summary["rows"], metric))
    line = []
    looks, titles, crossed = marks(summary), fields.names(summary["rows"]), fields.crossed(summary["rows"])
    by_cache: dict[str, list[tuple[float, float]]] = {}
    names = []
    for speed, value, row in points:
        colour, marker = looks[row["label"]]
        x = min(max(speed, across[0]), across[1])
        y = top if math.isinf(value) else min(max(value, low), high)
        if row["label"] in on_front:
            line.append((x, y))
        far = [fields.times(speed)] if x != speed else []
        far += [fields.written(value, metric["unit"], 3)] if y != value and math.isfinite(value) else []
        fill = "none" if far else colour  # drawn on the edge, hollow, with its figure
        axes.plot(x, y, linestyle="", color=colour, marker=marker, markerfacecolor=fill, zorder=2, clip_on=False)
        if row["label"] in crossed:
            by_cache.setdefault(colour, []).append((x, y))
        else:
            far = [titles[row["label"]], *far]
        if far:
            names.append((x, y, ": ".join(far)))
    for colour, places in by_cache.items():
        axes.plot(*zip(*sorted(places), strict=True), color=colour, linewidth=1, zorder=1)
    axes.plot(*zip(*sorted(line), strict=True), color=INK, linewidth=1, alpha=0.5, zorder=1)
    axes.axvline(1, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    better = f"{metric['unit']}   {fields.arrow(metric)} better".strip()
    axes.set(
        xlim=across, ylim=(low, top), xlabel="speed-up of the denoising loop", ylabel=better, title=metric["title"]
    )
    axes.spines[["top", "right"]].set_visible(False)
    return axes, names


def _name_points(figure: Figure, panels: Sequence[Panel]) -> None:
    """Write each point's name beside it, where it covers the least of other names and of points."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names move no panel
    point = figure.dpi / 72  # pixels
    for axes, names in panels:
        places = [tuple(axes.transData.transform((x, y))) for x, y, _ in names]
        covered = [Bbox.from_bounds(x - 4 * point, y - 4 * point, 8 * point, 8 * point) for x, y in places]
        room = axes.get_window_extent()
        for (x, y), (across, up, name) in zip(places, names, strict=True):
            text = axes.annotate(
                name, (across, up), (0, 0), textcoords="offset points", fontsize=7, zorder=3, ha="center", va="center",
                parse_math=False,
            )  # fmt: skip
            size = text.get_window_extent()
            choices: list[tuple[float, int, tuple[float, float], Bbox]] = []
            for ring, (right, above) in itertools.product(range(1, 4), SIDES):
                move = right * (size.width / 2 + 5 * ring * point), above * (size.height / 2 + 4 * ring * point)
                box = Bbox.from_bounds(
                    x + move[0] - size.width / 2, y + move[1] - size.height / 2, size.width, size.height
                )
                hidden = sum(_common(box, other) for other in covered) + box.width * box.height - _common(box, room)
                choices.append((hidden, len(choices), move, box))
            _, _, move, box = min(choices)
            text.xyann = (move[0] / point, move[1] / point)
            covered.append(box)


def _common(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


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
