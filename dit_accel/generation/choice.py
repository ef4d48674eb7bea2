"""The method of a run: typed with its settings, or from a saved accelerator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import registry
from dit_accel.checkpoint import format as checkpoint
from dit_accel.errors import DitAccelError
from dit_accel.hooks import dense_backend
from dit_accel.hooks import layers as layerwise
from dit_accel.hooks.layers import LayerSettings
from dit_accel.hooks.schedule import Schedule
from dit_accel.hooks.selfcheck import SelfCheck

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.accelerator import Accelerator
    from dit_accel.generation.request import MethodOptions
    from dit_accel.pipelines.family import Family
    from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """A method with its settings and schedule, typed or saved.

    Args:
        config: the given settings; empty with `layers`.
        folder: of the saved accelerator; None if typed, or from a layer schedule.
        layers: the settings of each layer, if a saved accelerator has them, or a layer schedule's.
        file: of the layer schedule, if there is one.
        selfcheck, any_weights, dense_backend: as in `checkpoint.load`.
        call: arguments of the pipeline's calls after a fine-tuning, such as fewer steps.
    """

    name: str
    config: dict[str, Any]
    schedule: Schedule
    folder: Path | None = None
    layers: LayerSettings | None = None
    any_weights: bool = False
    selfcheck: SelfCheck = dataclasses.field(default_factory=SelfCheck)
    dense_backend: str | None = None
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    file: Path | None = None

    @property
    def loaded(self) -> Path | None:
        """What --load named: the folder or the file."""
        return self.folder or self.file

    @property
    def settings(self) -> Any | LayerSettings:
        """One Config for all layers, or one for each."""
        return self.layers or layerwise.chosen(self.name, None, self.config, self.schedule.dense_layers)

    @property
    def title(self) -> str:
        """The choice as typed: ``gna:window=18x24x24,stride=4``."""
        return f"{self.name} layer by layer" if self.layers is not None else method_text(self.name, self.config)

    def check(self, grid: TokenGrid) -> None:
        """Refuse settings that do not fit this grid, or keep every pair of its tokens, before weights are loaded."""
        import torch

        from dit_accel.hooks.plan_cache import PlanCache

        own = self.settings
        layered = isinstance(own, LayerSettings)
        configs = [config for row in own.layers.values() for config in layerwise.distinct(row)] if layered else [own]
        for config in configs:
            PlanCache(registry.get_method(self.name), config).get(grid, torch.device("cpu"))

    def apply(self, pipe: DiffusionPipeline) -> Accelerator:
        """Accelerate the pipeline; errors as in `accelerate` and `checkpoint.load`."""
        from dit_accel import accelerator
        from dit_accel.checkpoint import load as saved

        how = {**dataclasses.asdict(self.selfcheck), "dense_backend": self.dense_backend}
        if self.folder is not None:
            return saved.load(pipe, self.folder, any_weights=self.any_weights, **how)
        how |= dataclasses.asdict(self.schedule)
        return accelerator.accelerate(pipe, self.name, layer_schedule=self.layers, **self.config, **how)

    def without_schedule(self) -> MethodChoice:
        """The same without schedule and self-check, so that a single step runs the method."""
        return dataclasses.replace(self, schedule=Schedule(), selfcheck=SelfCheck())

    def record(self) -> dict[str, Any]:
        """Plain values for JSON, default settings included."""
        own = self.settings
        config = {"layers": own.as_dict()} if isinstance(own, LayerSettings) else dataclasses.asdict(own)
        backend = {} if self.dense_backend is None else {"dense_backend": self.dense_backend}
        return {"name": self.name, "config": config, "schedule": dataclasses.asdict(self.schedule) | backend}


def choose(asked: MethodOptions, family: Family | None = None, transformers: int = 1) -> MethodChoice:
    """Read a choice from options; dense if there are none.

    What is recommended for a `family`, and so many transformers of a pipeline, replaces the methods' defaults.

    Raises:
        DitAccelError: method, settings, schedule or back end are refused or contradict --load, the folder holds no
            saved accelerator, or nothing is recommended for the family.
    """
    given = asked.schedule
    if asked.dense_backend is not None:
        import torch

        dense_backend.choose(asked.dense_backend, torch.device("cpu"))
    if asked.load is None:
        if asked.any_weights:
            raise DitAccelError("--any-weights belongs to --load, and none came.")
        if asked.method is None and (asked.settings or given or family is not None):
            raise DitAccelError("--set, --preset and --dense-* belong to --method, and none came.")
        name, config = registry.parse_method("dense" if asked.method is None else asked.method, asked.settings)
        if family is not None:
            preset = family.preset(name, transformers)
            config, given = {**preset.config, **config}, {**preset.schedule, **given}
        own = layerwise.chosen(name, None, config, given.get("dense_layers", 0))
        steps = own.schedule if isinstance(own, LayerSettings) else {}
        return MethodChoice(name, config, Schedule(**{**steps, **given}), dense_backend=asked.dense_backend)
    if asked.method or asked.settings or given or family is not None:
        raise DitAccelError(
            "--load brings the saved method, settings and schedule. Leave out --method, --set, --preset and --dense-*."
        )
    if asked.load.is_file():
        if asked.any_weights:
            raise DitAccelError(f"--any-weights belongs to a saved accelerator; {asked.load} is a layer schedule.")
        own = layerwise.read(asked.load)
        schedule = Schedule(**own.schedule)
        return MethodChoice(own.method, {}, schedule, layers=own, dense_backend=asked.dense_backend, file=asked.load)
    if not asked.load.is_dir():
        raise DitAccelError(
            f"--load {asked.load} is no folder and no file. Give a folder that Accelerator.save_pretrained wrote, or a "
            "layer schedule."
        )
    found = checkpoint.read(asked.load)
    saved, call = found.settings, {} if found.trained is None else found.trained["call"]
    layers = None if saved["layers"] is None else layerwise.from_dict(saved["method"], saved["layers"])
    return MethodChoice(
        saved["method"],
        saved["config"],
        Schedule(**saved["schedule"]),
        asked.load,
        layers,
        asked.any_weights,
        dense_backend=asked.dense_backend,
        call=call,
    )


def method_text(name: str, config: Mapping[str, Any]) -> str:
    """A method and its settings as typed: ``gna:window=18x24x24,stride=4``."""
    settings = ",".join(f"{key}={value_text(value)}" for key, value in config.items())
    return f"{name}:{settings}" if settings else name


def value_text(value: object) -> str:
    """A setting's value as typed: ``18x24x24``."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
