"""The settings of a training run in one frozen dataclass, from YAML recipes and from the command line."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from dit_accel import registry, values
from dit_accel.errors import DitAccelError
from dit_accel.generation.request import METHOD_FORM
from dit_accel.setting import Setting, parse_layers
from dit_accel.values import option

INDEX = "dataset.json"  # of a folder with prepared data
RECIPES = pathlib.Path(__file__).parent / "recipes"
MOST_STEPS = 10_000_000
MOST_SEED = 2**23 - 1  # a generator takes the seed and 40 bits of position


def parse_objectives(items: list[str]) -> dict[str, float]:
    """Objectives written NAME=WEIGHT, or NAME for a weight of 1."""
    weights = {}
    for item in items:
        name, equals, weight = item.partition("=")
        value = registry.parse_value(weight) if equals else 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DitAccelError(f"An objective is written NAME=WEIGHT, such as teacher=1.0; got {item!r}.")
        weights[name] = float(value)
    return weights


@dataclasses.dataclass(frozen=True)
class LevelSettings(values.Checked):
    """How noise levels are drawn for flow models: sigmoid of a normal, or uniform, then shifted towards noise.

    Source of the logit-normal: Esser et al., arXiv:2403.03206, section 3.1.
    """

    mean: float = option(0.0, "Mean of the normal.")
    std: float = option(1.0, "Standard deviation of the normal.", above=0)
    uniform: float = option(0.0, "Share of levels drawn uniformly instead.", least=0, most=1)
    shift: float | None = option(None, "s in s·σ / (1 + (s − 1)·σ); the scheduler's if not given.", above=0)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Multi-step consistency distillation; see `process.LevelSegments`."""

    segments: int = option(4, "Steps that the student will need.", least=1)
    teacher_steps: int = option(16, "Steps of the teacher's trajectory, a multiple of `segments` or more.", least=1)
    guidance: float = option(5.0, "The teacher's guidance scale; the student samples without guidance.")

    def __post_init__(self) -> None:
        values.check(self)
        if self.segments > self.teacher_steps:
            raise DitAccelError(f"Distillation needs 1 <= segments <= teacher_steps, got {self}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. The command line takes fields without an option of their own as `--option FIELD=VALUE`."""

    PANEL: ClassVar[str] = "Training"

    method: str = option(
        registry.DENSE, "How attention is computed; dense trains the model as it is.", metavar=METHOD_FORM
    )
    config: Mapping[str, Any] = option(
        {},
        "A setting of the method, repeatable. Values per axis are written 18x24x24.",
        flag="--set",
        metavar="KEY=VALUE",
        repeatable=True,
        parse=tuple,
    )
    dense_layers: int | float | tuple[int, ...] = option(
        0, "Layers that stay dense: how many of the first ones, or a list.", metavar="N|SHARE|I,J", parse=parse_layers
    )
    layer_schedule: str | None = option(None, "The file of a setting, in place of --method.", metavar="FILE.json")
    impl: str = option("auto", "The implementation of the kernels, as `accelerate` takes it.", typed=False)
    objectives: Mapping[str, float] = option(
        {"teacher": 1.0},
        "flow, teacher, attention, final, consistency, or one that `dit-accel ls METHOD` names; they add up.",
        flag="--objective",
        metavar="NAME=WEIGHT",
        repeatable=True,
        parse=parse_objectives,
    )
    attention_every: int = option(
        1, "The attention objective watches the last of every n self-attention layers.", least=1, typed=False
    )
    steps: int = option(1000, "Optimizer steps.", least=1, most=MOST_STEPS)
    batch: int = option(1, "Samples in a micro-batch of one process.", least=1)
    accumulation: int = option(1, "Micro-batches of one process in an optimizer step.", least=1, most=100_000)
    rate: float = option(1e-4, "Learning rate.", above=0)
    method_rate: float | None = option(
        None,
        "Learning rate of the method's own weights, such as SLA's projection; `rate` if not given.",
        above=0,
        typed=False,
    )
    warmup: int = option(0, "Number of first steps, over which the rate rises from 0.", least=0, typed=False)
    decay: Literal["constant", "cosine"] = option(
        "constant", "How the rate falls; cosine ends at a tenth.", typed=False
    )
    weight_decay: float = option(0.01, "Weight decay of AdamW.", least=0, typed=False)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "Betas of AdamW, from 0 to below 1.", least=0, below=1, typed=False
    )
    clip: float = option(1.0, "Largest norm of the gradient; 0 does not clip.", least=0, typed=False)
    rank: int = option(64, "Rank of the LoRA; 0 trains all weights of the transformer.", least=0)
    alpha: float | None = option(None, "Alpha of the LoRA; by default its rank.", above=0, typed=False)
    targets: tuple[str, ...] | None = option(
        None,
        "Ends of the names of the linear layers to adapt; by default those of self-attention.",
        typed=False,
    )
    levels: LevelSettings = option(LevelSettings, "How noise levels are drawn.", typed=False)
    empty_prompts: float = option(
        0.0, "Share of the micro-batches on the empty prompt, which guidance needs.", least=0, most=1, typed=False
    )
    distillation: Distillation = option(Distillation, "For the objective consistency.", typed=False)
    ema: float = option(
        0.0,
        "Decay of the averaged weights, which are saved in place of the last ones; 0 averages none.",
        least=0,
        below=1,
        typed=False,
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "no", "Mixed precision; no is float32, and auto is bf16 where the device has instructions for it, else no."
    )
    checkpointing: bool = option(False, "Recompute activations in the backward pass.", typed=False)
    seed: int = option(0, "Seed of data order and noise.", least=0, most=MOST_SEED)
    save_every: int = option(500, "Steps between checkpoints.", least=1)
    validate_every: int = option(0, "Steps between samples of --prompt; 0 makes none.", least=0)
    tracker: str | None = option(
        None, "Tracker of accelerate, such as tensorboard or wandb; losses.jsonl is always written."
    )

    def __post_init__(self) -> None:
        from dit_accel.kernels import impls
        from dit_accel.train import objectives

        values.check(self)
        objectives.check(self.objectives)
        impls.check(self.impl)
        setting = self.setting()
        if setting.ramped:
            raise DitAccelError(
                f"{setting.title} changes over the steps of a run, but training has no such steps. Give "
                "every setting one value."
            )
        method, configs = registry.get_method(setting.method), setting.configs()
        if any(config.anchors for config in configs) and {"attention", "final"} & self.objectives.keys():
            raise DitAccelError(
                f"The objectives attention and final compare tokens with the dense model's, and {method.name} adds "
                "anchors to them. Use flow and teacher."
            )
        objectives.check_method(self.objectives, method, configs)
        if method.name == registry.DENSE and not {"flow", "consistency"} & self.objectives.keys():
            raise DitAccelError(
                "The dense method is its own teacher, so there is nothing to learn. Choose a sparse method, or the "
                "objective flow or consistency."
            )

    def setting(self) -> Setting:
        """The setting to train with, of all noise levels: dense steps of a file do not count."""
        if self.layer_schedule is not None:
            return Setting.read(self.layer_schedule).changed(dense_steps=0, dense_last_steps=0)
        setting = Setting.make(self.method, self.config, dense_layers=self.dense_layers)
        return setting.changed(dense_steps=0, dense_last_steps=0)

    @property
    def trains_model(self) -> bool:
        """Whether the model's weights or a LoRA train; some objectives of methods leave them as they are."""
        from dit_accel.train import objectives

        return objectives.trains_model(self.objectives)


def make(plain: Mapping[str, Any]) -> TrainSettings:
    """Settings from plain values, such as a recipe's; see `values.build`."""
    settings: TrainSettings = values.build(TrainSettings, plain, "Training")
    return settings


@dataclasses.dataclass(frozen=True)
class Recipe(values.Checked):
    """A recipe file.

    Args:
        about: what it is for, in one line.
        source: where the settings come from.
        data: arguments of the data, as `dit-accel train` takes them.
        train: settings of the run, by name of `TrainSettings`' fields.
    """

    name: str
    about: str
    source: str
    model: str
    data: Mapping[str, Any]
    train: Mapping[str, Any]

    @property
    def settings(self) -> TrainSettings:
        return make(self.train)


def read_recipe(name: str) -> Recipe:
    """A recipe by the name of one that comes with the package, or by path; other files are refused."""
    content = values.read_yaml(name, RECIPES, "recipe")
    wanted = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    if set(content) != wanted:
        raise DitAccelError(f"The recipe {name} needs exactly the entries {', '.join(sorted(wanted))}.")
    return Recipe(pathlib.Path(name).stem, **content)
