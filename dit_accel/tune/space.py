"""What a search tries: methods at densities and presets, with and without dense steps, by layer, with step caches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel import registry
from dit_accel.accelerator import accelerate
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.eval.samples import key_of
from dit_accel.eval.summary import Evaluation
from dit_accel.files import read_json, replace_file
from dit_accel.generation import modular
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.sampling import TotalBar
from dit_accel.pipelines.family import Family
from dit_accel.plans import ramps
from dit_accel.schedule import STEPS
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid
from dit_accel.train import search
from dit_accel.train.data import Dataset, write
from dit_accel.train.prepare import Preparer
from dit_accel.train.settings import INDEX
from dit_accel.tune.request import TuneRequest

DENSITIES = (0.3, 0.2, 0.5, 0.1)  # the usual ones first, for a search that has no time for all
RAMP = (0.1, 0.3)  # densities of the first and the last sparse step
DENSE_STEPS = 0.2
SAMPLES = 4  # of a layer search
CACHES = ("mag:threshold=0.06", "mag:threshold=0.12")
SHARE_COMPUTED = 1 / 3  # of the steps, by the cache "steps"
STACKED = 2  # settings that the last round tries with every cache
DENSE_SETTING = Setting.make(registry.DENSE)
DENSE = Candidate(DENSE_SETTING)


def settings(
    request: TuneRequest, grid: TokenGrid, families: Sequence[Family], steps: int
) -> tuple[list[Candidate], dict[str, str]]:
    """The settings to try, each once, and why others are left out, by method and density.

    Args:
        families: of the model's transformers.
        steps: of the model's call. A number of dense steps becomes a share of them, since early rounds have fewer.

    Raises:
        DitAccelError: settings that were asked for do not fit the grid, or nothing does.
    """
    methods = registry.get_methods().values()
    free = [method.name for method in methods if method.at_density is not None and not method.needs_training]
    candidates: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}

    def add(method: str, config: dict[str, Any], words: dict[str, Any]) -> None:
        candidate = Candidate(Setting.make(method, config, **words))
        candidate.plans(grid)  # refuses what does not fit
        candidates.setdefault(key_of(candidate.record()), candidate)

    requested = {
        name: min(1.0, value / steps) if name in STEPS and isinstance(value, int) else value
        for name, value in request.words.items()
    }
    schedules = [requested] if "dense_steps" in requested else [{**requested, "dense_steps": DENSE_STEPS}, requested]
    for text in request.method or free:
        name, config = registry.parse_method(text)
        rule = registry.get_method(name).at_density
        if config or rule is None:
            for schedule in schedules:
                add(name, config, schedule)
            continue
        if name in families[0].recommended:
            preset = families[0].preset(name, len(families))
            try:
                add(name, dict(preset.config), {**preset.schedule, **requested})
            except DitAccelError as error:
                left_out[f"the preset of {name}"] = str(error)
        for density in DENSITIES:
            try:
                for schedule in schedules:
                    add(name, rule(grid, density), schedule)
            except DitAccelError as error:
                left_out[f"{name} at a density of {density}"] = str(error)
        try:
            for schedule in schedules if (config := ramp(name, *(rule(grid, density) for density in RAMP))) else ():
                add(name, config, schedule)
        except DitAccelError as error:
            left_out[f"{name} with a ramp of densities"] = str(error)
    if not candidates:
        raise DitAccelError(f"No setting fits the grid {grid}: {next(iter(left_out.values()))}")
    return list(candidates.values()), left_out


def ramp(method: str, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Settings that change from `first` to `last`; none if others than ramps would have to."""
    changing = [name for name, value in last.items() if first[name] != value]
    if not set(changing) <= set(ramps.allowed(registry.get_method(method).config)):
        return {}
    text = registry.value_text
    return {**last, **{name: text(first[name]) + ramps.DOTS + text(last[name]) for name in changing}}


def caches(pipe: Any, steps: int) -> tuple[list[StepCache], dict[str, str]]:
    """The step caches to try in a run of `steps` steps, and why the model cannot have others.

    The list of `steps` is dense at the start of the run, where a step changes most: its spacing grows geometrically.
    """
    computed = [0]
    while len(computed) < round(steps * SHARE_COMPUTED):
        computed.append(max(computed[-1] + 1, round(steps ** (len(computed) / round(steps * SHARE_COMPUTED))) - 1))
    texts = [*CACHES]
    if len(computed) > 1:
        texts.append(f"steps:computed={'x'.join(map(str, computed))},num_inference_steps={steps}")
    fitting, left_out = [], {}
    for text in texts:
        try:
            accelerate(pipe, registry.DENSE, cache=text).remove()
            fitting.append(StepCache.parse(text))
        except DitAccelError as error:
            left_out[f"the cache {text}"] = str(error)
    return fitting, left_out


def most_stacked(caches: int) -> int:
    """How many settings `stacked` adds at most, of so many caches."""
    return (1 + STACKED) * caches + 1


def stacked(request: TuneRequest, finalists: Sequence[Candidate], caches: Sequence[StepCache]) -> list[Candidate]:
    """Each cache alone and with the first finalists; in Morton order the first in raster order that nobody typed."""
    settings = [candidate.setting for candidate in finalists[:STACKED] if candidate.setting is not None]
    candidates = [setting.changed(cache=cache) for setting in (DENSE_SETTING, *settings) for cache in caches]
    typed = {registry.parse_method(text)[0] for text in request.method if registry.parse_method(text)[1]}
    free = [setting for setting in settings if setting.config is not None and setting.method not in typed]
    for setting in [setting for setting in free if registry.settings_of(setting.config).get("order") == "raster"][:1]:
        config = registry.make_config(setting.method, {**registry.settings_of(setting.config), "order": "morton"})
        candidates.append(dataclasses.replace(setting, config=config))
    return list(map(Candidate, candidates))


class LayerSearch:
    """The layer search of the best method: its settings are distributed over layers at the density of each.

    Args:
        evaluation: its model and prompts; the model is dense.
        tried: all settings of the search.
        steps: of the model's call.
    """

    def __init__(
        self, request: TuneRequest, evaluation: Evaluation, tried: Sequence[Candidate], steps: int, layers: int
    ) -> None:
        self.request, self.evaluation, self.steps, self.layers = request, evaluation, steps, layers
        self.tried = [
            candidate
            for candidate in tried
            if not candidate.layered and not (candidate.setting is not None and candidate.setting.ramped)
        ]
        pipe: Any = evaluation.sweep.pipe
        self.obstacle: str | None = None
        if modular.is_modular(type(pipe)) or getattr(pipe, "transformer_2", None) is not None:
            self.obstacle = "a layer search needs a pipeline with one transformer, and no modular one"
        elif request.dense_layers is not None:
            self.obstacle = "a layer search chooses the dense layers, and --dense-layers was given"
        elif request.offload != "none":
            self.obstacle = "a layer search needs all weights on the device, and --offload moves them"

    def configs(self, method: str) -> list[Any]:
        """The different Configs of a method that were tried."""
        settings = (candidate.setting for candidate in self.tried)
        return list(dict.fromkeys(setting.config for setting in settings if setting and setting.method == method))

    def work(self, method: str) -> int:
        """What a search takes, in denoising steps."""
        return SAMPLES * (self.steps + self.layers * len(self.configs(method)))

    def run(self, finalists: Sequence[Candidate], whole: TotalBar) -> list[Candidate]:
        """Layer schedules for the first finalist's method: one for each finalist of it, as dense as that is."""
        method = finalists[0].method
        configs = self.configs(method)
        table, folder = self._table(method, configs, whole), self.request.output / "layers"
        layered: dict[str, Candidate] = {}
        for candidate in (finalist for finalist in finalists if finalist.method == method and finalist in self.tried):
            assert candidate.setting is not None
            index = table.candidates.index(candidate.setting.config)
            budget = -(-table.costs[index] * search.RESOLUTION // 1) / search.RESOLUTION  # the search rounds up
            chosen = search.budgeted(table, budget)
            if all(choice == index for choice in chosen):
                continue
            schedule = dataclasses.replace(candidate.setting.schedule, dense_layers=0)
            key = key_of({"chosen": chosen, "schedule": dataclasses.asdict(schedule)})[:6]
            path = folder / f"{method}-{budget:.3g}-{key}.json"
            backend = candidate.setting.dense_backend
            layers, cache = table.layers(chosen), candidate.setting.cache
            setting = Setting(method, layers=layers, schedule=schedule, dense_backend=backend, cache=cache)
            search.write(path, table, chosen, setting, {"model": self.request.model, "budget": budget})
            layered[key] = Candidate(Setting.read(path))
        return list(layered.values())

    def _table(self, method: str, configs: list[Any], whole: TotalBar) -> search.Table:
        """The measured losses, or those of an earlier run."""
        folder = self.folder(method, configs)
        path = folder / "losses.json"
        if path.exists():
            whole.spare(self.work(method))
            known = read_json(path, "table of losses", "Delete it and run again.", ("costs", "losses"))
            return search.Table(method, tuple(configs), tuple(known["costs"]), tuple(map(tuple, known["losses"])))
        data = self.data(folder, whole)

        def count(done: int, total: int) -> None:
            whole.advance(SAMPLES * len(configs))

        table = search.measure(
            self.evaluation.sweep.pipe, method, configs, data, samples=SAMPLES, steps=self.steps, progress=count
        )
        replace_file(path, json.dumps({"costs": table.costs, "losses": table.losses}, allow_nan=False).encode())
        return table

    def folder(self, method: str, configs: list[Any]) -> Path:
        """Where a search of these settings on the evaluation's samples keeps its data and losses."""
        sweep, items = self.evaluation.sweep, self.evaluation.items
        settings = [registry.settings_of(config) for config in configs]
        identity = {"samples": [sweep.key(DENSE, item) for item in items], "method": method, "configs": settings}
        return self.request.output / "layers" / key_of(identity)

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
