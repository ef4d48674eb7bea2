"""Layer schedules: a method's settings for each self-attention layer.

A layer schedule is a JSON file that `accelerate` takes. A search (`dit_accel.train.search`) or a person writes it:

    {"format": 1, "method": "tile", "layers": {"transformer": [{"references": 1}, null, {"references": 2}]}}

Each transformer of the pipeline has one entry for every self-attention layer in the order they run; null is dense. An
entry "schedule" may have `dense_steps` and `dense_last_steps`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.files import read_json
from dit_accel.hooks.schedule import STEPS, Amount, Schedule
from dit_accel.registry import make_config, settings_of

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """One method with settings of its own for every layer.

    Args:
        method: name.
        layers: for each transformer, by component name, the Config of every layer in the order they run; None is dense.
        schedule: `dense_steps` and `dense_last_steps`, if they have some.
    """

    method: str
    layers: Mapping[str, tuple[Any | None, ...]]
    schedule: Mapping[str, Amount] = dataclasses.field(default_factory=dict)

    def of(self, transformer: str, count: int) -> tuple[Any | None, ...]:
        """The settings of a transformer's `count` layers."""
        if transformer not in self.layers:
            raise DitAccelError(
                f"The layer schedule is for {', '.join(self.layers)}, but this model has {transformer}. Use it with "
                "the model it was made for."
            )
        own = self.layers[transformer]
        if len(own) != count:
            raise DitAccelError(
                f"The layer schedule has settings for {len(own)} layers of {transformer}, which has {count}. Use it "
                "with the model it was made for."
            )
        return own

    def as_dict(self) -> dict[str, list[dict[str, Any] | None]]:
        """`layers` in plain values for JSON."""
        return {
            name: [None if config is None else settings_of(config) for config in own]
            for name, own in self.layers.items()
        }


def from_dict(method: str, layers: Any, schedule: Any = None) -> LayerSettings:
    """The inverse of `LayerSettings.as_dict`; `schedule` as in `LayerSettings`, None for none.

    Raises:
        DitAccelError: `layers` or `schedule` has another form, or a setting is refused.
    """
    if not isinstance(layers, dict) or not layers or not all(isinstance(own, list) for own in layers.values()):
        raise DitAccelError('A layer schedule has "layers" as {"transformer": [settings or null, ...]}, one per layer.')
    if schedule is not None and (not isinstance(schedule, dict) or not schedule.keys() <= set(STEPS)):
        raise DitAccelError(f'The "schedule" of a layer schedule may have {" and ".join(STEPS)}; got {schedule!r}.')
    Schedule(**(schedule or {}))
    configs = {name: tuple(_config(method, own) for own in row) for name, row in layers.items()}
    return LayerSettings(method, configs, schedule or {})


def _config(method: str, settings: Any) -> Any | None:
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise DitAccelError(f"A layer's settings are an object of {method}'s settings, or null; got {settings!r}.")
    return make_config(method, settings)


def read(path: str | pathlib.Path) -> LayerSettings:
    """Read a layer schedule.

    Raises:
        DitAccelError: the file is missing, no layer schedule, or of another format, or a setting is refused.
    """
    content = read_json(pathlib.Path(path), "layer schedule", "Give another file.", ("format", "method", "layers"))
    if not isinstance(content["method"], str):
        raise DitAccelError(f"{path} should name a method, such as 'radial'; it has {content['method']!r}.")
    if content["format"] != FORMAT:
        raise DitAccelError(f"{path} has format {content['format']!r}; this version reads format {FORMAT}.")
    return from_dict(content["method"], content["layers"], content.get("schedule"))


def to_json(settings: LayerSettings, **remarks: Any) -> str:
    """The text of a layer schedule; `remarks` are further entries for readers."""
    schedule = {"schedule": dict(settings.schedule)} if settings.schedule else {}
    content = {"format": FORMAT, "method": settings.method, **schedule, "layers": settings.as_dict(), **remarks}
    return json.dumps(content, indent=2) + "\n"


def distinct(configs: Sequence[Any | None]) -> list[Any]:
    """The different settings among layers, without the dense ones, in order of appearance."""
    return list(dict.fromkeys(config for config in configs if config is not None))


def chosen(
    method: str | None,
    layer_schedule: str | pathlib.Path | LayerSettings | None,
    config: dict[str, Any],
    dense_layers: Amount | tuple[int, ...],
) -> Any | LayerSettings:
    """The settings that `accelerate` was asked for: one Config for all layers, or one for each.

    Each layer has its own with a layer schedule, or with the file of a calibration as the setting `budgets`. Beside the
    latter, given settings and dense layers win over the file's.

    Raises:
        DitAccelError: there is neither method nor layer schedule, or there are settings besides a schedule. The
            schedule is neither a file nor settings. The file has no budgets for this method.
    """
    if layer_schedule is None:
        if method is None:
            raise DitAccelError("accelerate needs a method, such as 'radial', or layer_schedule=.")
        if isinstance(config.get("budgets"), (str, os.PathLike)) and config["budgets"] != "equal":
            return _budgeted(method, **config, dense_layers=dense_layers)
        return make_config(method, config)
    if not isinstance(layer_schedule, (str, os.PathLike, LayerSettings)):
        raise DitAccelError(
            f"layer_schedule is a file or LayerSettings, got {layer_schedule!r}; a layer search writes such a file."
        )
    settings = layer_schedule if isinstance(layer_schedule, LayerSettings) else read(layer_schedule)
    if method not in (None, settings.method) or config or dense_layers:
        raise DitAccelError(
            f"A layer schedule holds method ({settings.method}), settings and dense layers. Leave out the method, its "
            f"settings and dense_layers (got {method}, {config}, {dense_layers})."
        )
    return settings


def _budgeted(
    method: str, budgets: str | pathlib.Path, dense_layers: Amount | tuple[int, ...], **config: Any
) -> LayerSettings:
    """The settings of each layer from a file with budgets, with the given ones in place of the file's."""
    own, dense = read(budgets), Schedule(dense_layers=dense_layers)
    used = [layer for row in own.layers.values() for layer in distinct(row)]
    if own.method != method or any(getattr(layer, "budgets", "equal") == "equal" for layer in used):
        raise DitAccelError(
            f"budgets takes a file with budgets of {method}'s heads, as `dit-accel tune --calibrate` writes it; "
            f"{budgets} is a layer schedule of {own.method}{'' if own.method != method else ' without budgets'}."
        )
    layers = {
        name: tuple(
            None if layer is None or index in dense.layers(len(row)) else make_config(method, vars(layer) | config)
            for index, layer in enumerate(row)
        )
        for name, row in own.layers.items()
    }
    return LayerSettings(method, layers, own.schedule)
