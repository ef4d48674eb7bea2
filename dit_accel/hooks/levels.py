"""A level of a loaded pipeline: the case that it is chosen for, and a warning where a call is another case."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.hooks.steps import StepClock
from dit_accel.pipelines.family import Family, ModelInputs
from dit_accel.pipelines.levels import Case, LevelRow, choose
from dit_accel.registry import DENSE
from dit_accel.setting import Setting

SIZE = ("frames", "height", "width", "steps")


def case_of(
    transformers: Mapping[str, tuple[nn.Module, Family]], pipeline: Any | None, size: Mapping[str, Any]
) -> Case:
    """The case of a pipeline's calls of a size.

    Args:
        transformers: with their families, by component name.
        size: frames, height and width in pixels, and denoising steps; what is missing is the pipeline's default.

    Raises:
        DitAccelError: the size is unknown or cannot be made, as that of a transformer without its pipeline.
    """
    for name, value in size.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DitAccelError(f"The {name} of a level are a whole number of at least 1, got {value!r}.")
    transformer, family = next(iter(transformers.values()))
    if pipeline is None:
        raise DitAccelError(
            f"A level is chosen by the size of a call, which {type(transformer).__name__} alone does not tell. Pass "
            f"the pipeline, or name a method: {family.choices}."
        )
    vae = getattr(pipeline, "vae", None)
    try:
        sizes = family.sizes(_config(transformer), _config(vae))
    except KeyError as missing:
        raise DitAccelError(
            f"A level is chosen by the size of a call, and {type(pipeline).__name__} lacks {missing}, which tells it. "
            f"Load it with its VAE, or name a method: {family.choices}."
        ) from missing
    grid = sizes.grid(*sizes.chosen(*(size.get(name) for name in ("frames", "height", "width"))))
    names = [str(getattr(getattr(part, "config", None), "_name_or_path", "")) for part in (pipeline, transformer)]
    device = getattr(pipeline, "_execution_device", None) or next(transformer.parameters()).device
    steps = size.get("steps") or _default_steps(pipeline)
    gpu = torch.device(device).type != "cpu"
    return Case(family.name, (*names, type(vae).__name__), sizes.video, grid.visual, steps, gpu)


def _config(component: Any) -> Mapping[str, Any]:
    return getattr(component, "config", None) or {}


def _default_steps(pipeline: Any) -> int | None:
    """The number of steps of the pipeline's calls; None if it has no default."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


@dataclasses.dataclass
class Level:
    """A level that was chosen for a case.

    Args:
        name: one of `levels.LEVELS`.
        row: its settings there.
    """

    name: str
    case: Case
    row: LevelRow
    _run: Any = dataclasses.field(default=None, init=False, repr=False)

    @classmethod
    def choose(cls, name: str, case: Case) -> Level:
        """The level of that name in a case."""
        return cls(name, case, choose(name, case))

    def setting(self, **words: Any) -> Setting:
        """Its settings; `words` win, as in `Setting.changed`. Warns if they change nothing."""
        setting = Setting.parse(self.row.setting).changed(**words)
        if setting.method == DENSE and setting.cache is None and setting.dense_backend is None:
            warnings.warn(
                f"The level {self.name} leaves the model as it is for {self.case}: {self.row.source}.",
                DitAccelWarning,
                stacklevel=3,
            )
        return setting

    @property
    def note(self) -> str:
        """What a report says of it."""
        return f"level {self.name} for {self.case}: {self.row.setting} ({self.row.source})"

    def check(self, transformer: nn.Module, family: Family, call: ModelInputs, clock: StepClock) -> None:
        """Warn, in the first call of a run, if the level has other settings for its size than those at work."""
        run = clock.run
        if run is None or run is self._run:
            return
        self._run = run
        with torch.device("cpu"):
            tokens = family.layout(transformer, call).grid.visual
        step = clock.now_if_told(family.timestep(call))
        steps = self.case.steps if step is None else step.count
        actual = dataclasses.replace(self.case, tokens=tokens, steps=steps, gpu=call.device.type != "cpu")
        row = choose(self.name, actual)
        if row.setting != self.row.setting:
            warnings.warn(
                f"The level {self.name} was chosen for {self.case}, and this call has {actual}. For it the level is "
                f"{row.setting!r}. Give the call's size to the level: accelerate(pipe, {self.name!r}, frames=..., "
                f"height=..., width=..., steps={steps}, replace=True).",
                DitAccelWarning,
                stacklevel=2,
            )
