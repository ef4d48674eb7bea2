"""The request to `dit-accel train`: a run, its data and its settings, some of them from a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dit_accel import registry, values
from dit_accel.errors import DitAccelError
from dit_accel.generation import captioned, prompts
from dit_accel.generation.request import PROMPTS_FORM, DeviceOptions, SizeOptions, SourceOptions
from dit_accel.plans import ramps
from dit_accel.train.settings import INDEX, TrainSettings, make, read_recipe
from dit_accel.values import option

GENERATED, CLIPS, FOLDER = "generated", "clips", "folder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(SourceOptions, DeviceOptions):
    """The model, the task and the output folder."""

    recipe: str | None = option(None, "Recipe to start from; other options take precedence.", metavar="NAME|FILE")
    samples: tuple[str, ...] = option(
        (),
        "Prompt to sample every --validate-every steps, repeatable.",
        flag="--prompt",
        metavar="TEXT",
        repeatable=True,
    )
    prepare: bool = option(False, "Make the training data in OUTPUT/data, and stop.")
    search: Path | None = option(
        None, "Do not train: search for a layer schedule and write it to this file.", metavar="FILE.json"
    )
    candidates: tuple[str, ...] = option(
        (), "Settings to try in every layer, repeatable.", flag="--candidate", metavar="KEY=VALUE,...", repeatable=True
    )
    threshold: float | None = option(None, "In a search: the largest loss that a layer may add.", least=0)
    budget: float | None = option(None, "In a search: the mean density to reach.", least=0, most=1)
    others: tuple[str, ...] = option(
        (),
        "Any other field of TrainSettings, such as ema=0.99 or levels.shift=5.",
        flag="--option",
        metavar="KEY=VALUE",
        repeatable=True,
    )
    output: Path = option(Path("trained"), "Folder of the run. Run the same command again to resume.", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        searching = {"--candidate": self.candidates, "--threshold": self.threshold, "--budget": self.budget}
        unused = [flag for flag, value in searching.items() if value not in (None, ())]
        if self.search is None and unused:
            raise DitAccelError(f"Only --search takes {', '.join(unused)}. Add --search FILE.json, or leave them out.")
        if self.search is not None and (self.prepare or self.samples):
            raise DitAccelError("--search trains nothing; leave out --prepare and --prompt.")

    def candidate_configs(self, method: str) -> list[Any]:
        """The Configs that a layer search tries; it needs some, and either a threshold or a budget."""
        if (self.threshold is None) == (self.budget is None):
            came = "none" if self.budget is None else f"--threshold {self.threshold} and --budget {self.budget}"
            raise DitAccelError(f"A layer search needs one of --threshold and --budget, got {came}. Give one of them.")
        if not self.candidates:
            raise DitAccelError("A layer search needs settings to try. Give --candidate KEY=VALUE,..., several times.")
        texts = (f"{method}:{text}" for text in self.candidates)
        configs = (registry.make_config(*registry.parse_method(text)) for text in texts)
        return [ramps.of_all_steps(config, "A --candidate") for config in configs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(SizeOptions):
    """The source of the training data."""

    PANEL: ClassVar[str] = "Data"

    source: str = option(
        GENERATED,
        "A folder (prepared, or captioned media), 'generated' by the dense model, or 'clips' (the demo's own).",
        flag="--data",
        metavar="SOURCE",
    )
    prompts: str | None = option(None, "Prompts of generated data, one a line.", metavar=PROMPTS_FORM)
    count: int | None = option(None, "Number of samples; by default 256 clips, or one for each prompt.", least=1)
    steps: int | None = option(None, "Of generated samples; the model's own if not given.", least=1, typed=False)
    guidance: float | None = option(None, "Of generated samples; the model's own if not given.", typed=False)

    @property
    def prepared(self) -> bool:
        """Whether the source is a data folder."""
        return (Path(self.source) / INDEX).is_file()

    def check(self) -> None:
        """Refuse a source that is missing or has no prompts or captions."""
        if self.source == FOLDER:
            raise DitAccelError("This recipe is for your own captioned videos. Give their folder with --data FOLDER.")
        if self.source == GENERATED:
            self.read_prompts()
        elif self.source != CLIPS and not Path(self.source).is_dir():
            raise DitAccelError(
                f"There is no training data {self.source}. Give a folder (prepared, or captioned media), {GENERATED!r} "
                f"with --prompts FILE, or {CLIPS!r} for the demo's own clips."
            )
        elif self.source != CLIPS and not self.prepared:
            captioned.find_all(Path(self.source), "remove the file")

    def read_prompts(self) -> list[str]:
        """The prompts, as `dit_accel.generation.prompts` reads them."""
        if self.prompts is None:
            raise DitAccelError(
                "The model's own samples need prompts. Give --prompts FILE with one per line, or the name of a list or "
                "a captioned folder."
            )
        return list(prompts.read(self.prompts).texts[: self.count])


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """All options of `dit-accel train`."""

    run: RunOptions
    data: DataSettings
    train: TrainSettings

    @classmethod
    def of(cls, run: Mapping[str, Any], data: Mapping[str, Any], train: Mapping[str, Any]) -> TrainRequest:
        """The request that options from the command line and their recipe make, fields of the three by name."""
        options = RunOptions(**run)
        base = None if options.recipe is None else read_recipe(options.recipe)
        changes = {**read_options(options.others), **train}
        if base is None and not {"method", "layer_schedule"} & changes.keys():
            raise DitAccelError("train needs a method first: --method, such as sla, or a --recipe, such as sla-demo.")
        if {"method", "config"} & train.keys():
            method = train.get("method", base.train["method"] if base else registry.DENSE)
            changes["method"], changes["config"] = registry.parse_method(method, train.get("config", ()))
        if options.search is not None:
            changes.setdefault("objectives", {"flow": 1.0})
            method = changes.get("method", registry.DENSE)
            changes["config"] = changes.get("config") or registry.settings_of(options.candidate_configs(method)[0])
        if base is not None:
            options = dataclasses.replace(options, model=run.get("model", base.model))
        sources = {**(base.data if base else {}), **data}
        settings = merge(base.train if base else {}, changes)
        if options.samples and not settings.validate_every:
            raise DitAccelError(
                "--prompt is sampled every --validate-every steps, and --validate-every is 0. Give it a number of "
                "steps, or leave out --prompt."
            )
        if changes.get("validate_every") and not options.samples:
            raise DitAccelError(
                f"--validate-every {settings.validate_every} samples prompts, got no --prompt. Add one, or "
                "leave out --validate-every."
            )
        origin = values.build(DataSettings, sources, "The data")
        if "prompts" in data and origin.source != GENERATED:
            raise DitAccelError(
                f"Only --data {GENERATED} reads --prompts, got --data {origin.source} --prompts {origin.prompts}. "
                f"Leave out --prompts, or give --data {GENERATED}."
            )
        return cls(options, origin, settings)


def read_options(items: tuple[str, ...]) -> dict[str, Any]:
    """Further settings of the training, KEY=VALUE; those of `levels` and `distillation` as levels.shift=5."""
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not text:
            raise DitAccelError(f"--option takes KEY=VALUE, such as ema=0.99 or levels.shift=5; got {item!r}.")
        outer, dot, inner = key.partition(".")
        value = tuple(map(registry.parse_value, text.split(","))) if "," in text else registry.parse_value(text)
        if not dot:
            options[outer] = value
            continue
        if not isinstance(options.setdefault(outer, {}), dict):
            raise DitAccelError(f"--option {item} contradicts {outer}={options[outer]!r}. Give one of them.")
        options[outer][inner] = value
    return options


def merge(recipe: Mapping[str, Any], replacing: Mapping[str, Any]) -> TrainSettings:
    """A recipe's settings, replaced by given ones; nested ones are merged."""
    merged = dict(recipe)
    for name, value in replacing.items():
        nested = name in ("levels", "distillation") and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if nested else value
    return make(merged)
