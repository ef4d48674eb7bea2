"""MagCache's ratios of a model, its steps and guidance: measured on dense runs, saved for ``mag_ratios=FILE``."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dit_accel.accelerator import Accelerator
from dit_accel.caches.ratios import MagRatios
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.eval import quality
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.sampling import TotalBar, progress_bar
from dit_accel.setting import Setting
from dit_accel.tune.request import TuneRequest

FILE = "mag_ratios.json"
Ratios = dict[str, list[float | None]]  # by guidance branch, one for each step; None: another transformer ran


def run(request: TuneRequest) -> list[str]:
    """Measure the mean over the prompts, write the file, and return lines that name it and say how to take it.

    Raises:
        DitAccelError: the request cannot be carried out. Finished runs stay, and the next calibration uses them.
    """
    cache = StepCache.of(request.cache)
    assert cache is not None
    measured = Candidate(Setting.make("dense", cache=StepCache("mag", {"calibrate": True})))
    with quality.opened(request.evaluation(metrics=("psnr",)), [measured]) as evaluation, progress_bar() as progress:
        sweep, items = evaluation.sweep, evaluation.items
        steps = sweep.steps(measured) or 1
        whole = TotalBar(progress, "all prompts", steps * len(items))
        runs: list[dict[str, Ratios]] = []
        for item in items:
            runs.append(sweep.observe(measured, item, "ratios", {}, record_ratios, request.output / "ratios", whole))
            whole.advance(steps)
        about = evaluation.origin()
    path = request.output / FILE
    mean(runs, f"calibration of {request.model}").save(path, **about)
    settings = {name: value for name, value in cache.config.items() if name not in ("calibrate", "mag_ratios")}
    typed = dataclasses.replace(cache, config={**settings, "mag_ratios": str(path)})
    return [f"ratios: {path}", f"try it: {request.command(cache=typed)}"]


def record_ratios(accel: Accelerator, run: Callable[[], Any]) -> dict[str, Any]:
    """The ratios of one run, by transformer and guidance branch."""
    run()
    report = accel.report()
    assert report.cache is not None
    return report.cache.ratios


def mean(runs: Sequence[dict[str, Ratios]], source: str) -> MagRatios:
    """The mean ratios over runs and over the transformers that ran a step.

    Raises:
        DitAccelError: the model's calls have more than two guidance branches.
    """
    names = list(dict.fromkeys(branch for run in runs for branches in run.values() for branch in branches))
    if not 1 <= len(names) <= 2:
        raise DitAccelError(f"MagCache has ratios for one or two guidance branches, but this model has {len(names)}.")
    by_branch = []
    for name in names:
        rows = [branches[name] for run in runs for branches in run.values() if name in branches]
        columns = itertools.zip_longest(*rows)
        known = ([ratio for ratio in column if ratio is not None] for column in columns)
        by_branch.append(tuple(round(statistics.mean(ratios), 5) if ratios else 1.0 for ratios in known))
    return MagRatios(by_branch[0], by_branch[1] if len(by_branch) > 1 else (), source)
