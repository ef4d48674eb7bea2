"""Milliseconds that a call should take on an H200, part by part: `python -m tools.kernels.predict [--rows FILE]`.

The model of the exact part is that of the log: a query block costs `START` microseconds and a step of 128 keys `STEP`,
a masked step `MASKED` more, and query blocks in launch order go to the next free multiprocessor. All other parts are
bytes over the memory's bandwidth and operations over a rate. Nothing here is a measurement: with the rows of a run, the
table has the measured milliseconds beside the predicted ones, so that a wrong prediction is seen.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dit_accel.bench.rows import OutOfReach, Row, Shape, Target, get_shape
from dit_accel.kernels.block_sparse.pieces import UNIT, fastest
from dit_accel.order import valid_tokens
from dit_accel.plans.routed import RoutedPlan
from dit_accel.plans.static import MaskPlan
from dit_accel.plans.tailed import TailedPlan

MULTIPROCESSORS = 132
STEP, MASKED = 1.85, 0.3  # microseconds; D = 128, 128 queries, from the rows of 2026-11-22
START, PROGRAM = 3.0, 8.0  # microseconds of an item: a guess for programs that load the next one early; of those rows
KEYS = 128  # of a step
BANDWIDTH = 4.8e12  # bytes a second
FP32, DENSE = 50e12, 610e12  # operations a second: of plain fp32 instructions, and of cuDNN's dense attention
BISECTIONS = 64  # of a row's scores, each a comparison and a sum
GATE_MAPS = 12  # times that rectified's gate reads or writes a map of scores
LAUNCH, PIECES = 0.02, 0.06  # milliseconds: of a launch, and of the merge of text rows' pieces
SHAPES = ("hunyuan-768p", "hunyuan-720p", "wan-14b-720p", "wan-14b-480p", "flux-4k", "flux-2k", "mochi", "cogvideox")
TARGETS = (
    Target("gna", 0.1),
    Target("radial", 0.1),
    Target("tile", 0.1),
    Target.of("sla", topk=0.05, block_q=128),
    Target("sol", 0.16),
    Target("sparge", 0.16),
    Target("rectified", 0.16),
)
PARTS = ("router", "lists", "exact", "tail", "text")


class Item(NamedTuple):
    """One query block of one head: the steps that it takes, and how many of them are masked."""

    steps: int
    masked: int

    def milliseconds(self, head_dim: int, start: float) -> float:
        """Of all steps, behind `start` microseconds."""
        return (start + self.steps * STEP * head_dim / 128 + self.masked * MASKED) / 1000


class Prediction(NamedTuple):
    """Milliseconds of a call by part; a part that the method has not is None."""

    router: float | None
    lists: float | None
    exact: float
    tail: float | None
    text: float | None

    @property
    def total(self) -> float:
        return sum(part or 0.0 for part in self)


def makespan(milliseconds: Iterable[float], processors: int = MULTIPROCESSORS) -> float:
    """When the last program ends, each started in order on the first free multiprocessor."""
    free = [0.0] * processors
    for length in milliseconds:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def dense_ms(shape: Shape) -> float:
    """Of cuDNN's dense attention: two products over all pairs."""
    return 4 * shape.tokens**2 * shape.head_dim * shape.heads / DENSE * 1000


def steps_of(plan: MaskPlan) -> tuple[list[Item], list[Item]]:
    """The query blocks of one head of a static plan: those of text, and the visual ones."""
    mask = plan.block_mask()
    blocks = mask.key_order.visual_blocks
    whole = torch.zeros(mask.key_order.blocks, dtype=torch.bool)
    whole[:blocks] = valid_tokens(mask.key_order) == mask.key_order.block
    listed = mask.lists().used
    pure = listed & ~mask.partial & whole[mask.kv_indices.long()]
    in_step = KEYS // mask.key_order.block
    items = [
        Item(math.ceil(count / in_step), math.ceil(count / in_step) - unmasked // in_step)
        for count, unmasked in zip(mask.kv_counts.tolist(), pure.sum(-1).tolist(), strict=True)
    ]
    visual = mask.query_order.visual_blocks
    return items[visual:], items[:visual]


def static_prediction(plan: MaskPlan, shape: Shape, start: float) -> Prediction:
    """Of a plan whose lists follow from the grid: one launch, the text rows of all heads first."""
    text, visual = steps_of(plan)
    order = text * shape.heads + visual * shape.heads
    return Prediction(None, None, makespan(item.milliseconds(shape.head_dim, start) for item in order), None, None)


def routed_prediction(plan: RoutedPlan, shape: Shape, share: float, start: float) -> Prediction:
    """Of a plan whose rows list `share` of the visual key blocks, and the text behind them."""
    queries, keys, grid = plan.query_order, plan.key_order, plan.grid
    rows = queries.visual_blocks * shape.heads
    listed, scores = math.ceil(share * keys.visual_blocks), rows * keys.visual_blocks
    read = grid.visual * 2 * shape.heads * shape.head_dim / BANDWIDTH * 1000  # one of q, k and v
    router = 2 * read + scores * (2 * (shape.head_dim + BISECTIONS) / FP32 + 3 * 4 / BANDWIDTH) * 1000
    if plan.method == "rectified":  # its gate reads q and k, multiplies three times and writes fp32 maps
        router += 2 * read + scores * (3 * 2 * shape.head_dim / FP32 + GATE_MAPS * 4 / BANDWIDTH) * 1000
    lists = rows * listed * 2 * 4 / BANDWIDTH * 1000 + LAUNCH
    text_steps = math.ceil(grid.text / KEYS)
    item = Item(math.ceil(listed * keys.block / KEYS) + text_steps, text_steps)
    exact = makespan([item.milliseconds(shape.head_dim, start)] * rows)
    text = None
    if grid.text:
        text_rows = math.ceil(grid.text / 128) * shape.heads
        count = fastest(text_rows, math.ceil(grid.tokens / KEYS), KEYS, MULTIPROCESSORS, start / STEP * KEYS / UNIT)
        item = Item(math.ceil(grid.tokens / KEYS / count), math.ceil(text_steps / count))
        text = makespan([item.milliseconds(shape.head_dim, start)] * (text_rows * count)) + PIECES * (count > 1)
    return Prediction(router, lists, exact, _others(plan, shape, read, rows), text)


def _others(plan: RoutedPlan, shape: Shape, read: float, rows: int) -> float | None:
    """What becomes of the blocks that are not listed: pseudo-keys and their steps, or SLA's state and its product."""
    if isinstance(plan, TailedPlan):
        steps = Item(math.ceil(plan.key_order.visual_blocks / KEYS), math.ceil(plan.key_order.visual_blocks / KEYS))
        further = steps.milliseconds(shape.head_dim, 0) * math.ceil(rows / MULTIPROCESSORS)
        return 2 * read + further if plan.has_tail else None
    return 2 * read + LAUNCH


def predict(shape: Shape, target: Target, start: float = START) -> Prediction:
    """Of a forward call in bf16 on an H200; `start` are an item's microseconds beside its steps.

    Raises:
        OutOfReach: the method comes not near enough to the density.
    """
    plan = target.setting_on(shape.grid).plan(shape.grid)
    if isinstance(plan, MaskPlan):
        return static_prediction(plan, shape, start)
    assert isinstance(plan, RoutedPlan)
    share = plan.config.topk if target.density is None else target.density
    return routed_prediction(plan, shape, share, start)


def measured(rows: Sequence[dict[str, Any]], shape: Shape, target: Target) -> float | None:
    """Milliseconds of a run's row of that name."""
    name = Row(shape, target, "bfloat16", "forward").name
    return next((row["ms_p50"] for row in rows if row["row"] == name and row.get("ms_p50")), None)


def table(rows: Sequence[dict[str, Any]], shapes: Sequence[str], start: float = START) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| row | {' | '.join(PARTS)} | sum | times dense |{' measured |' if rows else ''}"
    yield "|---" * (len(PARTS) + 3 + bool(rows)) + "|"
    for shape, target in itertools.product(map(get_shape, shapes), TARGETS):
        try:
            parts = predict(shape, target, start)
        except OutOfReach:
            continue
        cells = [*(_digits(part) for part in parts), _digits(parts.total), f"{dense_ms(shape) / parts.total:.1f}"]
        cells += [_digits(measured(rows, shape, target))] if rows else []
        yield f"| `{target.title}` {shape.name} | {' | '.join(cells)} |"


def _digits(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="measured rows, to stand beside the predictions")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable; all if not given")
    parser.add_argument(
        "--start", type=float, default=START, metavar="MICROSECONDS",
        help=f"what an item takes beside its steps: {PROGRAM:g} for a program each; default {START:g}",
    )  # fmt: skip
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()] if arguments.rows else []
    print("\n".join(table(rows, arguments.shape or SHAPES, arguments.start)))


if __name__ == "__main__":
    main()
