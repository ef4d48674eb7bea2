"""Draw what several GPUs would do into docs/pictures/several-gpus.png: `python -m tools.forecast_picture`.

Counts are those of `dit-accel plan --gpus`; rates are assumed. Nothing in the picture was measured.
"""

import math
from pathlib import Path
from typing import Any, Literal

import dit_accel
from dit_accel.eval.report.pictures import STYLE
from dit_accel.plans.several_gpus import Forecast, Parallel, forecast

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "several-gpus.png"
GRID = dit_accel.TokenGrid(61, 96, 176)  # 1,030,656 tokens
METHODS: dict[str, dict[str, Any]] = {"dense": {}, "gna": {"window": 0.3}, "tile": {"references": 4}}
COLOURS = {"dense": "#8a8a8a", "gna": "#173f7a", "tile": "#c65d21"}
WAYS: dict[Parallel, tuple[Literal["-", "--", ":"], str]] = {
    "ulysses": ("-", "o"),
    "unified": ("--", "s"),
    "ring": (":", "^"),
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
HEADS, HEAD_DIM, TFLOPS, LINK = 40, 128, 500.0, 400.0


def curves() -> dict[tuple[str, Parallel], dict[int, Forecast]]:
    """Forecasts by method, way and number of GPUs; Ulysses ends at the number of heads."""
    plans = {name: dit_accel.plan(name, GRID, **settings) for name, settings in METHODS.items()}
    return {
        (name, way): {
            gpus: forecast(plan, gpus, way, HEADS, HEAD_DIM)
            for gpus in GPUS
            if way != "ulysses" or HEADS >= gpus
            if way != "unified" or math.gcd(gpus, HEADS) < gpus
        }
        for name, plan in plans.items()
        for way in WAYS
    }


def draw(path: Path) -> None:
    """Time, traffic and balance against the number of GPUs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = {
        "seconds of compute, slowest GPU": lambda one: one.compute_ms(TFLOPS, HEAD_DIM) / 1e3,
        "milliseconds of traffic, busiest GPU": lambda one: one.traffic_ms(LINK),
        "balance: mean over most pairs": lambda one: one.balance,
    }
    forecasts = curves()
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        for axis, (title, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for (name, way), by_gpus in forecasts.items():
                shown = {gpus: value(one) for gpus, one in by_gpus.items() if value(one) > 0}
                line, marker = WAYS[way]
                axis.plot(
                    list(shown),
                    list(shown.values()),
                    line,
                    color=COLOURS[name],
                    marker=marker,
                    markersize=4,
                    linewidth=3.5 if name == "dense" else 1.3,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
            axis.set_xlabel("GPUs")
            axis.set_title(title, fontsize=9)
            if "seconds" in title:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
                axis.yaxis.set_minor_formatter("")
                if "traffic" in title:
                    axis.set_yticks((5, 10, 20, 50))
            else:
                axis.set_ylim(0, 1.05)
        keys = [
            Line2D([], [], color=COLOURS[name], label=dit_accel.Setting.make(name, settings).text)
            for name, settings in METHODS.items()
        ]
        keys += [
            Line2D([], [], color="black", linestyle=line, marker=marker, markersize=4, label=way)
            for way, (line, marker) in WAYS.items()
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(PICTURE)
