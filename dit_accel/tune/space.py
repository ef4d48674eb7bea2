"""What a search tries: methods at some densities and presets, with and without dense steps, and layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.eval.samples import key_of
from dit_accel.eval.summary import Evaluation
from dit_accel.eval.sweep import Candidate
from dit_accel.files import read_json, replace_file
from dit_accel.generation import modular
from dit_accel.generation.choice import MethodChoice
from dit_accel.generation.sampling import TotalBar
from dit_accel.hooks.layers import LayerSettings
from dit_accel.hooks.schedule import STEPS, Schedule
from dit_accel.pipelines.family import Family
from dit_accel.tokens import TokenGrid
from dit_accel.train import search
from dit_accel.train.data import Dataset, write
from dit_accel.train.prepare import Preparer
from dit_accel.train.settings import INDEX
from dit_accel.tune.request import TuneRequest

DENSITIES = (0.5, 0.3, 0.2, 0.1)
DENSE_STEPS = 0.2
SAMPLES = 4  # of a layer search
DENSE = Candidate(MethodChoice("dense", {}, Schedule()))


def settings(
    request: TuneRequest, grid: TokenGrid, families: Sequence[Family], steps: int
) -> tuple[list[MethodChoice], dict[str, str]]:
    """The settings to try, each once, and why others are left out, by method and density.

    Args:
        families: of the model's transformers.
        steps: of the model's call. A number of dense steps becomes a share of them, since early rounds have fewer.

    Raises:
        DitAccelError: settings that were asked for do not fit the grid, or nothing does.
    """
    methods = registry.get_methods().values()
    free = [method.name for method in methods if method.at_density is not None and not method.needs_training]
    found: dict[str, MethodChoice] = {}
    left_out: dict[str, str] = {}

    def add(name: str, config: dict[str, Any], schedule: dict[str, Any]) -> None:
        choice = MethodChoice(name, config, Schedule(**schedule), dense_backend=request.dense_backend)
        choice.check(grid)
        found.setdefault(key_of(choice.record()), choice)

    given = {
        name: min(1.0, value / steps) if name in STEPS and isinstance(value, int) else value
        for name, value in request.schedule.items()
    }
    schedules = [given] if "dense_steps" in given else [given, {**given, "dense_steps": DENSE_STEPS}]
    for text in request.method or free:
        name, config = registry.parse_method(text)
        rule = registry.get_method(name).at_density
        if config or rule is None:
            for schedule in schedules:
                add(name, config, schedule)
            continue
        for density in DENSITIES:
            try:
                for schedule in schedules:
                    add(name, rule(grid, density), schedule)
            except DitAccelError as error:
                left_out[f"{name} at a density of {density}"] = str(error)
        if name in families[0].recommended:
            preset = families[0].preset(name, len(families))
            add(name, dict(preset.config), {**preset.schedule, **given})
    if not found:
        raise DitAccelError(f"No setting fits the grid {grid}: {next(iter(left_out.values()))}")
    return list(found.values()), left_out


class LayerSearch:
    """The layer search of the best method: its settings are distributed over layers at the density of each.

    Args:
        evaluation: its model and prompts; the model is dense.
        tried: all settings of the search.
        steps: of the model's call.
    """

    def __init__(
        self, request: TuneRequest, evaluation: Evaluation, tried: Sequence[MethodChoice], steps: int, layers: int
    ) -> None:
        self.request, self.evaluation, self.steps, self.layers = request, evaluation, steps, layers
        self.tried = [choice for choice in tried if not isinstance(choice.settings, LayerSettings)]
        pipe: Any = evaluation.sweep.pipe
        self.obstacle: str | None = None
        if modular.is_modular(type(pipe)) or getattr(pipe, "transformer_2", None) is not None:
            self.obstacle = "a layer search needs a pipeline with one transformer, and no modular one"
        elif request.dense_layers is not None:
            self.obstacle = "a layer search chooses the dense layers, and --dense-layers was given"
        elif request.offload != "none":
            self.obstacle = "a layer search needs all weights on the device, and --offload moves them"

    def configs(self, method: str) -> list[dict[str, Any]]:
        """The different settings of a method that were tried."""
        own = [choice for choice in self.tried if choice.name == method]
        return list({key_of(dataclasses.asdict(choice.settings)): choice.config for choice in own}.values())

    def work(self, method: str) -> int:
        """What a search takes, in denoising steps."""
        return SAMPLES * (self.steps + self.layers * len(self.configs(method)))

    def run(self, finalists: Sequence[MethodChoice], whole: TotalBar) -> list[MethodChoice]:
        """Layer schedules for the first finalist's method: one for each finalist of it, as dense as that is."""
        method = finalists[0].name
        configs = self.configs(method)
        table, folder = self._table(method, configs, whole), self.request.output / "layers"
        made: dict[str, MethodChoice] = {}
        for choice in (each for each in finalists if each.name == method and each in self.tried):
            index = table.candidates.index(choice.settings)
            budget = -(-table.costs[index] * search.RESOLUTION // 1) / search.RESOLUTION  # the search rounds up
            chosen = search.budgeted(table, budget)
            if all(each == index for each in chosen):
                continue
            steps = choice.schedule.steps()
            key = key_of({"chosen": chosen, "schedule": steps})[:6]
            path = folder / f"{method}-{budget:.3g}-{key}.json"
            layers = search.write(path, table, chosen, {"model": self.request.model, "budget": budget}, steps)
            schedule = dataclasses.replace(choice.schedule, dense_layers=0)
            made[key] = MethodChoice(method, {}, schedule, layers=layers, dense_backend=choice.dense_backend, file=path)
        return list(made.values())

    def _table(self, method: str, configs: list[dict[str, Any]], whole: TotalBar) -> search.Table:
        """The measured losses, or those of an earlier run."""
        folder = self.folder(method, configs)
        path = folder / "losses.json"
        made = tuple(registry.make_config(method, config) for config in configs)
        if path.exists():
            whole.spare(self.work(method))
            known = read_json(path, "table of losses", "Delete it and run again.", ("costs", "losses"))
            return search.Table(method, made, tuple(known["costs"]), tuple(map(tuple, known["losses"])))
        data = self.data(folder, whole)

        def count(done: int, total: int) -> None:
            whole.advance(SAMPLES * len(configs))

        table = search.measure(
            self.evaluation.sweep.pipe, method, configs, data, samples=SAMPLES, steps=self.steps, progress=count
        )
        replace_file(path, json.dumps({"costs": table.costs, "losses": table.losses}, allow_nan=False).encode())
        return table

    def folder(self, method: str, configs: list[dict[str, Any]]) -> Path:
        """Where a search of these settings on the evaluation's samples keeps its data and losses."""
        sweep, items = self.evaluation.sweep, self.evaluation.items
        asked = {"samples": [sweep.key(DENSE, item) for item in items], "method": method, "configs": configs}
        return self.request.output / "layers" / key_of(asked)

    def data(self, folder: Path, whole: TotalBar) -> Dataset:
        """Samples of the dense model for the prompts, or those of an earlier run."""
        sweep, items = self.evaluation.sweep, self.evaluation.items
        arguments, data = sweep.arguments(DENSE), folder / "data"
        if not (data / INDEX).is_file():
            preparer = Preparer(sweep.pipe, arguments)
            prompts = [items[index % len(items)].prompt for index in range(SAMPLES)]
            samples = preparer.generated(prompts, arguments, items[0].seed)
            write(data, samples, preparer.conditioning("")[0], preparer.size)
        whole.advance(SAMPLES * self.steps)
        return Dataset(data)
