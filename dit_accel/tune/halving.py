"""Successive halving: every round keeps the better half, and runs it on more denoising steps.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
arXiv:1502.07943, algorithm 1, with the number of steps as its resource. Rounds cost about the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dit_accel.eval import gates, verdict
from dit_accel.eval.gates import Limit
from dit_accel.eval.report import fields

FINALISTS = 4
FEWEST_STEPS = 2
Row = dict[str, Any]


def rounds(settings: int, steps: int) -> list[tuple[int, int]]:
    """Settings and denoising steps of each round; the last one has all steps and at most `FINALISTS` settings."""
    counts = [settings]
    while counts[-1] > FINALISTS:
        counts.append(math.ceil(counts[-1] / 2))
    halvings = range(len(counts) - 1, -1, -1)
    return [(n, min(steps, max(FEWEST_STEPS, steps >> late))) for n, late in zip(counts, halvings, strict=True)]


def order(rows: Sequence[Row], metrics: Sequence[dict[str, Any]], limits: Sequence[Limit]) -> list[tuple[int, Row]]:
    """Rows of a summary with the number of their front in speed-up and main metric, the best first.

    Within a front those come first whose figure is nearest to the bound of the first limit.
    """
    main = verdict.main_metric(metrics)
    assert main is not None
    numbers = fields.fronts([(row["speedup"], verdict.goodness(row, main)) for row in rows])

    def distance(row: Row) -> float:
        value = gates.figures_of(row)[limits[0].figure]
        return math.inf if value is None else abs(value - limits[0].bound)

    return sorted(zip(numbers, rows, strict=True), key=lambda each: (each[0], distance(each[1])))
