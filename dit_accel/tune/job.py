"""A search from its request to the settings file: rounds of `dit_accel.eval`, the layer search, the verdict."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.eval import gates, quality, verdict
from dit_accel.eval.gates import Limit
from dit_accel.eval.report import fields
from dit_accel.eval.samples import Row
from dit_accel.eval.summary import Evaluation, Summary
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.sampling import TotalBar, progress_bar
from dit_accel.pipelines.targets import find_transformers
from dit_accel.tune import space
from dit_accel.tune.request import TuneRequest
from dit_accel.tune.rounds import Affordable, Pace, affordable, rounds

FILE = "settings.json"


def run(request: TuneRequest) -> tuple[Summary, list[str]]:
    """Search.

    Returns:
        The summary of the last round: the baseline, then the rows of its front. The last line of its verdict is about
        the target. Then lines that name the settings file, none if no setting that gains holds the target.

    Raises:
        DitAccelError: the request cannot be carried out. Finished samples stay, and the next search uses them.
    """
    assert request.target is not None
    times = re.fullmatch(rf"\s*({gates.NUMBER})\s*x?\s*", request.target)
    if times is not None and float(times[1]) <= 0:
        raise DitAccelError(f"--target is a speed-up above 0, such as 1.5x, or limits; got {request.target!r}.")
    require = request.target if times is None else f"speedup>={times[1]}"
    limits = gates.parse(require, "--target")
    measured = [limit.figure for limit in limits if limit.figure not in gates.FIGURES]
    evaluation = request.evaluation(metrics=tuple(dict.fromkeys(["psnr", *measured])), require=require)
    dense = Candidate()
    with quality.opened(evaluation, [dense]) as opened, progress_bar() as progress:
        pipe: Any = opened.sweep.pipe
        steps = opened.sweep.steps(dense)
        if steps is None:
            raise DitAccelError("This model has no usual number of denoising steps. Give it with --steps.")
        transformers = find_transformers(pipe)[0].values()
        tried, left_out = space.settings(request, opened.grid, [family for _, family in transformers], steps)
        caches, refused = ([], {}) if request.cache is not None else space.caches(pipe, steps)
        for text, why in (left_out | refused).items():
            print(f"left out: {text}: {why}", file=sys.stderr)
        layers = sum(1 for transformer, family in transformers for _ in family.attentions(transformer))
        search = space.LayerSearch(request, opened, tried, steps, layers)
        if request.minutes is not None:
            fitting = _affordable(request, opened, tried, search, len(caches))
            tried, search = fitting.settings, space.LayerSearch(request, opened, fitting.settings, steps, layers)
            if not fitting.layers and search.obstacle is None:
                search.obstacle = f"--minutes {request.minutes:g} leaves no time for a layer search"
        if search.obstacle is not None:
            print(f"left out: settings layer by layer: {search.obstacle}.", file=sys.stderr)
        planned, candidates = rounds(len(tried), steps), tried
        work = sum((count + 1) * round_steps for count, round_steps in planned)
        whole = TotalBar(progress, "all of it", work * len(opened.items))
        for number, (_, round_steps) in enumerate(planned, 1):
            final = number == len(planned)
            stack = space.stacked(request, candidates, caches) if final else []
            whole.spare(-len(stack) * round_steps * len(opened.items))
            if final and search.obstacle is None and len(search.configs(candidates[0].method)) > 1:
                whole.spare(-search.work(candidates[0].method))
                layered = search.run(candidates, whole)
                whole.spare(-len(layered) * round_steps * len(opened.items))
                candidates = [*candidates, *layered]
            candidates = [*candidates, *stack]
            of_round = dataclasses.replace(
                evaluation, steps=round_steps, methods=tuple(candidates), output=request.output / f"round-{number}",
                pictures=evaluation.pictures if final else 0,
            )  # fmt: skip
            result, _ = quality.run(of_round, pipe, whole)
            assert result is not None, "tune runs in one process"
            summary = result
            by_label = {candidate.label: candidate for candidate in candidates}
            ordered = order(summary["rows"][1:], summary["metrics"], limits)
            if not final:
                candidates = [by_label[row["label"]] for _, row in ordered[: planned[number][0]]]
        answer = summary["verdict"][-1]
        front = [row for place, row in ordered if place == 0]
        summary |= {"rows": [summary["rows"][0], *sorted(front, key=lambda row: row["speedup"])], "verdict": [answer]}
        if "row" not in answer:
            return summary, []
        figures = gates.figures_of(next(row for _, row in ordered if row["label"] == answer["row"]))
        setting = by_label[answer["row"]].setting
        assert setting is not None
        tuned = {"target": request.target, "row": answer["row"], "model": request.model, "figures": figures}
        lines = request.write(FILE, setting, tuned=tuned)
    return summary, lines


def _affordable(
    request: TuneRequest, opened: Evaluation, tried: Sequence[Candidate], search: space.LayerSearch, caches: int
) -> Affordable:
    """The part of the search that fits into `--minutes`, after a dense call that tells the pace; a line on stderr."""
    dense, item = Candidate(), opened.items[0]
    opened.sweep.run([dense], [item])
    pace = Pace.of(opened.sweep.results.rows[opened.sweep.key(dense, item)])
    methods = dict.fromkeys(candidate.method for candidate in tried)
    steps, minutes = opened.sweep.steps(dense), request.minutes
    assert steps is not None and minutes is not None
    layer_steps = 0 if search.obstacle is not None else max(search.work(method) for method in methods)
    stacked = space.most_stacked(caches)
    fitting = affordable(
        tried, minutes, pace, steps=steps, prompts=len(opened.items), stacked=stacked, layer_steps=layer_steps
    )
    print(
        f"--minutes {minutes:g}: tries {len(fitting.settings)} of {len(tried)} settings, which takes at most "
        f"{fitting.seconds / 60:.1f} minutes. A dense step takes {pace.step:.3g} s.",
        file=sys.stderr,
    )
    return fitting


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

    return sorted(zip(numbers, rows, strict=True), key=lambda pair: (pair[0], distance(pair[1])))
