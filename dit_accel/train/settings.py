"""All that says how a training run goes, in one frozen dataclass, from YAML recipes and from the command line."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from dit_accel import registry, values
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Impl
from dit_accel.registry import did_you_mean
from dit_accel.train import objectives
from dit_accel.train.process import LevelSettings

RECIPES = pathlib.Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Multi-step consistency distillation; see `distill.py`.

    Args:
        segments: steps that the student is to need.
        teacher_steps: steps of the teacher's trajectory, a multiple of `segments` or more.
        guidance: the teacher's guidance scale, which the student learns to do without.

    Raises:
        DitAccelError: a value is of the wrong kind, fewer teacher steps than segments, or no segments.
    """

    segments: int = 4
    teacher_steps: int = 16
    guidance: float = 5.0

    def __post_init__(self) -> None:
        values.check(self)
        if not 1 <= self.segments <= self.teacher_steps:
            raise DitAccelError(f"Distillation needs 1 <= segments <= teacher_steps, got {self}.")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Args:
        method, config, dense_layers, layer_schedule, impl: as in `accelerate`; "dense" trains the model as it is.
        objectives: weight of each objective of `objectives.py`.
        attention_every: the attention objective watches every n-th self-attention layer, the last one of each n.
        steps: optimizer steps.
        batch: samples in a micro-batch of one process.
        accumulation: micro-batches of one process in an optimizer step.
        rate: learning rate of LoRA or full weights.
        method_rate: of the method's own weights (SLA's projection); None is `rate`.
        warmup: first steps, over which the rate rises from 0.
        decay: "constant" or "cosine" (to a tenth).
        weight_decay, betas, clip: of AdamW and of the gradient's norm; a clip of 0 does not clip.
        rank: of the LoRA; 0 trains all weights of the transformer.
        alpha: of the LoRA; None is `rank`.
        targets: names of the linear layers to adapt, as they end; None is q, k, v and output of self-attention.
        levels: how noise levels are drawn.
        empty_prompts: share of the micro-batches that train on the empty prompt, which guidance needs.
        distillation: for the objective "consistency".
        ema: decay of the averaged weights, which are what is saved; 0 keeps none.
        precision: "no" (float32), "bf16" or "fp16", as in `accelerate`.
        checkpointing: recompute activations in the backward pass.
        seed: of data order and noise.
        save_every: steps between checkpoints.
        validate_every: steps between validation samples; 0 makes none.
        tracker: "tensorboard", "wandb" or any name `accelerate` knows; None writes losses.jsonl alone.

    Raises:
        DitAccelError: a value is of the wrong kind or out of range, or values contradict each other.
    """

    method: str = "dense"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense_layers: int | float | tuple[int, ...] = 0
    layer_schedule: str | None = None
    impl: Impl = "auto"
    objectives: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"teacher": 1.0})
    attention_every: int = 1
    steps: int = 1000
    batch: int = 1
    accumulation: int = 1
    rate: float = 1e-4
    method_rate: float | None = None
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    levels: LevelSettings = dataclasses.field(default_factory=LevelSettings)
    empty_prompts: float = 0.0
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    ema: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    validate_every: int = 0
    tracker: str | None = None

    def __post_init__(self) -> None:
        values.check(self)
        objectives.check(self.objectives)
        impls.check(self.impl)
        if self.layer_schedule is None:
            registry.make_config(self.method, self.config)
        for least, names in (
            (1, ("steps", "batch", "accumulation", "save_every", "attention_every")),
            (0, ("warmup", "rank", "validate_every", "seed", "clip", "weight_decay")),
        ):
            for name in names:
                if not getattr(self, name) >= least:
                    raise DitAccelError(f"{name} is at least {least}, got {getattr(self, name)!r}.")
        for name in ("rate", "method_rate", "alpha"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise DitAccelError(f"{name} is above 0, got {getattr(self, name)!r}.")
        if not 0 <= self.ema < 1 or not 0 <= self.empty_prompts <= 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise DitAccelError(
                f"Training needs 0 <= ema < 1, 0 <= empty_prompts <= 1 and betas from 0 to below 1; got {self.ema}, "
                f"{self.empty_prompts} and {self.betas}."
            )
        if (
            self.method == "dense"
            and self.layer_schedule is None
            and not {"flow", "consistency"} & self.objectives.keys()
        ):
            raise DitAccelError(
                "The dense method is its own teacher, so there is nothing to learn from it: choose a sparse method, or "
                "an objective among flow and consistency."
            )

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def make(plain: Mapping[str, Any]) -> TrainSettings:
    """Settings from plain values, such as a recipe's.

    Raises:
        DitAccelError: an unknown setting, or a value that is refused.
    """
    nested: dict[str, Any] = {"levels": LevelSettings, "distillation": Distillation}
    made = {
        name: values.build(nested[name], value, name) if name in nested else _tupled(value)
        for name, value in plain.items()
    }
    if isinstance(made.get("config"), Mapping):
        made["config"] = {key: _tupled(value) for key, value in made["config"].items()}
    return values.build(TrainSettings, made, "Training")


def _tupled(value: Any) -> Any:
    """YAML has no tuples."""
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Args:
        name: of the file.
        about: what it is for, in one line.
        source: where the settings come from.
        model: it is for.
        data: arguments of the data, as `dit-accel train` takes them.
        train: settings of the run, by name of `TrainSettings`' fields.

    Raises:
        DitAccelError: a value is of the wrong kind.
    """

    name: str
    about: str
    source: str
    model: str
    data: Mapping[str, Any]
    train: Mapping[str, Any]

    def __post_init__(self) -> None:
        values.check(self)

    @property
    def settings(self) -> TrainSettings:
        return make(self.train)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """A recipe by the name of one that comes with the package, or by path.

    Raises:
        DitAccelError: there is none, or it is not one.
    """
    try:
        import yaml
    except ImportError as error:
        raise DitAccelError("Recipes need PyYAML, which is not installed: pip install 'dit_accel[train]'.") from error

    path = RECIPES / f"{name}.yaml" if name in list_recipes() else pathlib.Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = list_recipes()
        raise DitAccelError(
            f"There is no recipe {name}.{did_you_mean(name, known)} Give a YAML file or one of: {', '.join(known)}."
        ) from error
    except yaml.YAMLError as error:
        raise DitAccelError(f"The recipe {name} is not valid YAML: {str(error).splitlines()[0]}.") from error
    wanted = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    if not isinstance(content, dict) or set(content) != wanted:
        raise DitAccelError(f"The recipe {name} needs exactly the entries {', '.join(sorted(wanted))}.")
    return Recipe(path.stem, **content)
