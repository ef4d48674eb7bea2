"""One setting of a pipeline: method and settings, what stays dense, dense attention's back end, and a step cache.

It is made once, and everything between the command line and the engine holds it.

Text: ``METHOD[:key=value,...]``, then words of the schedule, the back end and the step cache, as in
``radial:decay=0.2 dense_steps=0.2 dense_layers=0,3 dense_backend=auto cache=mag:threshold=0.12``. A value may be a ramp
over the sparse steps, as in ``sol:tau=1.3..0.8`` (`dit_accel.plans.ramps`). `Setting.parse` reads it.

A JSON file holds a setting, too, also one whose layers differ; ``tile:layers=FILE.json`` is the text of what it holds.
A search writes it, or a person:

    {"format": 2, "method": "tile", "layers": {"transformer": [{"references": 1}, null, {"references": 2}]},
     "schedule": {"dense_steps": 0.2}}

Each transformer of the pipeline has one entry for every self-attention layer in the order they run; null is dense. An
entry "config" in place of "layers" has the settings of all layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, read_json
from dit_accel.plans.ramps import Ramped, ends, of_all_steps
from dit_accel.registry import DENSE, get_method, make_config, parse_method, parse_value, plain, settings_of, value_text
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from dit_accel.pipelines.family import Preset
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid

FORMAT = 2  # of files
SCHEDULE = tuple(field.name for field in dataclasses.fields(Schedule))
WORDS = (*SCHEDULE, "dense_backend", "cache")  # behind the method in a text

Layers = Mapping[str, tuple[Any | None, ...]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a pipeline's transformers compute attention, in every layer and step.

    Args:
        method: name.
        config: the method's Config for all layers, or a `Ramped` whose Config changes over the steps; None with
            `layers`.
        layers: for each transformer, by component name, the same of every layer in the order they run; None is dense.
        schedule: steps and layers that stay dense.
        dense_backend: back end of what stays dense, as in `accelerate`; None: the model's own.
        cache: skips blocks in some steps; None: nothing is skipped.
        typed: how a text names the file of `layers`, such as ``layers=FILE.json``.

    Raises:
        DitAccelError: there are neither `config` nor `layers`, or both.
    """

    method: str
    config: Any | None = None
    layers: Layers | None = None
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    dense_backend: str | None = None
    cache: StepCache | None = None
    typed: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if (self.config is None) == (self.layers is None):
            raise DitAccelError("A Setting has either config, for all layers, or layers, with the settings of each.")

    @classmethod
    def make(
        cls,
        method: str,
        config: Mapping[str, Any] | None = None,
        *,
        preset: Callable[[str], Preset] | None = None,
        **words: Any,
    ) -> Setting:
        """A setting from plain values.

        Args:
            method: a name, or a text with settings, schedule and back end.
            config: further settings by name; they win over the text's. ``layers=FILE`` takes the settings of each layer
                from a file, and ``budgets=FILE`` those of a calibration; what is given besides wins in every layer.
            preset: the recommendation for a method, over which everything else wins.
            words: fields of the schedule, `dense_backend` and `cache`; they win over the text's, and None is not given.
                With the cache "first-block" layer 0 stays dense unless `dense_layers` says otherwise: the cache decides
                by what that layer adds.

        Raises:
            DitAccelError: the method or a setting is unknown, a value is refused, or the file has no budgets for it.
        """
        name, text_config, text_words = _split(method)
        recommended = None if preset is None else preset(name)
        config = {**(recommended.config if recommended else {}), **text_config, **(config or {})}
        words = text_words | {key: plain(value) for key, value in words.items() if value is not None}
        schedule = {**(recommended.schedule if recommended else {}), **_only(words, SCHEDULE)}
        for key in ("layers", "budgets"):
            if isinstance(config.get(key), (str, os.PathLike)) and config[key] != "equal":
                return cls._of_file(name, key, config).changed(**(words | schedule))
        setting = cls(name, make_config(name, config), None, Schedule(**schedule), words.get("dense_backend"))
        return setting.changed(**_only(words, ("cache",)), **_only(schedule, ("dense_layers",)))

    @classmethod
    def parse(cls, text: str, settings: Iterable[str] = (), **more: Any) -> Setting:
        """The setting of a text and further ``key=value`` strings, which win; `more` and errors as in `make`.

        Example:
            >>> Setting.parse("gna:window=18x24x24 dense_steps=12", ["stride=2"]).text
            'gna:window=18x24x24,stride=2 dense_steps=12'
        """
        return cls.make(text, parse_method(_split(text)[0], settings)[1], **more)

    @classmethod
    def read(cls, path: str | pathlib.Path) -> Setting:
        """Read a file.

        Raises:
            DitAccelError: the file is missing, holds no setting, or is of another format, or a value is refused.
        """
        content = read_json(pathlib.Path(path), "setting", "Give another file.", ("format", "method"))
        if content["format"] != FORMAT:
            raise DitAccelError(f"{path} has format {content['format']!r}; this version reads format {FORMAT}.")
        try:
            setting = cls.from_dict(content)
        except DitAccelError as error:
            raise DitAccelError(f"{path}: {error}") from error
        return setting if setting.layers is None else dataclasses.replace(setting, typed=f"layers={path}")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Setting:
        """The inverse of `as_dict`; further entries are remarks for readers.

        Raises:
            DitAccelError: an entry has another form, or a value is refused.
        """
        method, layers, schedule = record.get("method"), record.get("layers"), record.get("schedule") or {}
        backend, cache = record.get("dense_backend"), StepCache.of(record.get("cache"))
        if not isinstance(method, str):
            raise DitAccelError(f'The "method" of a setting is a name, such as "radial"; got {method!r}.')
        if not isinstance(schedule, dict) or not schedule.keys() <= set(SCHEDULE):
            raise DitAccelError(f'The "schedule" of a setting may have {", ".join(SCHEDULE)}; got {schedule!r}.')
        if not isinstance(backend, str | None):
            raise DitAccelError(f'The "dense_backend" of a setting is a name or null; got {backend!r}.')
        if layers is None:
            return cls(method, _config(method, record.get("config")), None, Schedule(**schedule), backend, cache)
        if not isinstance(layers, dict) or not layers or not all(isinstance(row, list) for row in layers.values()):
            raise DitAccelError('The "layers" of a setting are {"transformer": [settings or null, ...]}, one a layer.')
        configs = {
            name: tuple(None if settings is None else _config(method, settings) for settings in row)
            for name, row in layers.items()
        }
        return cls(method, None, configs, Schedule(**schedule), backend, cache)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, default settings included."""
        if self.layers is None:
            settings: dict[str, Any] = {"config": settings_of(self.config)}
        else:
            rows = self.layers.items()
            settings = {"layers": {name: [config and settings_of(config) for config in row] for name, row in rows}}
        schedule = dataclasses.asdict(self.schedule)
        cache = None if self.cache is None else self.cache.as_dict()
        others = {"schedule": schedule, "dense_backend": self.dense_backend, "cache": cache}
        return {"method": self.method, **settings, **others}

    def to_json(self, **remarks: Any) -> str:
        """The text of a file; `remarks` are further entries for readers."""
        return json.dumps({"note": MARK, "format": FORMAT, **self.as_dict(), **remarks}, indent=2) + "\n"

    @property
    def title(self) -> str:
        """The method and its settings as typed, without defaults: ``gna:window=18x24x24,stride=4``."""
        if self.layers is not None:
            return f"{self.method}:{self.typed}" if self.typed else f"{self.method} layer by layer"
        assert self.config is not None
        defaults = {field.name: field.default for field in dataclasses.fields(get_method(self.method).config)}
        settings = {name: value for name, value in settings_of(self.config).items() if value != defaults[name]}
        return method_text(self.method, settings)

    def words(self) -> dict[str, str]:
        """Schedule, back end and step cache as typed, by name, where they differ from the defaults."""
        words = {**dataclasses.asdict(self.schedule), "dense_backend": self.dense_backend, "cache": self.cache}
        shown = {name for name, value in words.items() if value}
        if self.cache is not None and self.cache.name == "first-block" and self.method != DENSE:
            shown.add("dense_layers")  # whose default is another with this cache
        return {name: _word_text(value) for name, value in words.items() if name in shown}

    @property
    def text(self) -> str:
        """The setting as typed; it parses back, but for `layers` that were read from no file."""
        return " ".join([self.title, *(f"{name}={text}" for name, text in self.words().items())])

    def changed(self, **words: Any) -> Setting:
        """The setting with other words, as `make` takes them; None is not given."""
        words = {key: plain(value) for key, value in words.items() if value is not None}
        schedule = dataclasses.replace(self.schedule, **_only(words, SCHEDULE))
        backend = words.get("dense_backend", self.dense_backend)
        cache = StepCache.of(words["cache"]) if "cache" in words else self.cache
        first = "cache" in words and cache is not None and cache.name == "first-block" and self.method != "dense"
        if first and "dense_layers" not in words and not schedule.dense_layers:
            schedule = dataclasses.replace(schedule, dense_layers=1)
        return dataclasses.replace(self, schedule=schedule, dense_backend=backend, cache=cache)

    def configs(self) -> list[Any]:
        """The different Configs among the layers, in order of appearance; of a ramp those of its ends."""
        return list(dict.fromkeys(config for layer in self._configs() for config in ends(layer)))

    @property
    def ramped(self) -> bool:
        """Whether settings change from step to step."""
        return any(isinstance(config, Ramped) for config in self._configs())

    def _configs(self) -> list[Any]:
        rows = [(self.config,)] if self.layers is None else self.layers.values()
        return [config for row in rows for config in row if config is not None]

    def plan(self, grid: TokenGrid) -> Plan:
        """The plan of the one Config on a grid; settings whose layers or steps differ have none."""
        from dit_accel.plans.plan import building

        if self.config is None:
            raise DitAccelError(f"A plan is for one layer, but the layers of {self.title} differ. Give other settings.")
        with building():
            return get_method(self.method).plan(grid, of_all_steps(self.config, "A plan"))

    def by_layer(self, transformer: str, count: int) -> list[tuple[Any | None, str | None]]:
        """The Config of each of a transformer's `count` layers, and the reason if the layer stays dense.

        Raises:
            DitAccelError: `layers` are of another model.
        """
        row = (self.config,) * count if self.layers is None else self._row(transformer, count)
        dense = self.schedule.layers(count)
        return [(config, self._dense_reason(config, index in dense)) for index, config in enumerate(row)]

    def _dense_reason(self, config: Any | None, scheduled: bool) -> str | None:
        if self.method == DENSE:
            return f"method {self.method}"
        if config is None:
            return "layer schedule"
        return f"dense_layers={self.schedule.dense_layers}" if scheduled else None

    def _row(self, transformer: str, count: int) -> tuple[Any | None, ...]:
        assert self.layers is not None
        if transformer not in self.layers:
            raise DitAccelError(
                f"The layer schedule is for {', '.join(self.layers)}, but this model has {transformer}. Use it with "
                "the model it was made for."
            )
        row = self.layers[transformer]
        if len(row) != count:
            raise DitAccelError(
                f"The layer schedule has settings for {len(row)} layers of {transformer}, which has {count}. Use it "
                "with the model it was made for."
            )
        return row

    @classmethod
    def _of_file(cls, method: str, key: str, config: Mapping[str, Any]) -> Setting:
        """The setting in the file that `config` names under a key, with the other settings in place of its own."""
        setting = cls.read(config[key])
        equal = key == "budgets" and any(layer.budgets == "equal" for layer in setting.configs())
        if setting.method != method or equal:
            raise DitAccelError(
                f"{key} takes a file with {key} of {method}, as `dit-accel tune` writes it; {config[key]} is a setting "
                f"of {setting.method}{' without budgets' if equal else ''}."
            )
        others = {name: value for name, value in config.items() if name != key}

        def with_others(config: Any | None) -> Any | None:
            return make_config(method, settings_of(config) | others) if config is not None and others else config

        rows = (
            None
            if setting.layers is None
            else {name: tuple(map(with_others, row)) for name, row in setting.layers.items()}
        )
        typed = None if rows is None else method_text("", config).removeprefix(":")
        return dataclasses.replace(setting, config=with_others(setting.config), layers=rows, typed=typed)


def _split(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Method, settings and words of a text, by name."""
    if not isinstance(text, str):
        get_method(text)
    parts = re.split(rf"\s+(?=(?:{'|'.join(WORDS)})\s*=)", text.strip())
    name = re.split(r"[:\s]", parts[0], maxsplit=1)[0]
    get_method(name)
    rest = parts[0].removeprefix(name)
    if rest and not rest.startswith(":"):
        raise DitAccelError(
            f"{rest.strip()!r} behind {name} is neither a setting nor a word. Settings of a method follow a colon, as "
            f"in {name}:key=value; the words are {', '.join(WORDS)}, each with = and a value."
        )
    method, config = parse_method(parts[0])
    words: dict[str, Any] = {}
    for part in parts[1:]:
        key, _, value = (side.strip() for side in part.partition("="))
        if key in words or not value:
            raise DitAccelError(f"{key} of {method} is given once, with a value; got {text!r}.")
        words[key] = value if key == "cache" else parse_layers(value) if key == "dense_layers" else parse_value(value)
    return method, config, words


def parse_layers(text: str) -> Any:
    """The value of dense_layers: a number or share of layers, or, with a comma, a tuple of their indices."""
    if "," not in text:
        return parse_value(text)
    layers = tuple(parse_value(part.strip()) for part in text.removesuffix(",").split(","))
    if "" in layers:
        raise DitAccelError(
            f"--dense-layers takes layers with commas, such as 0,3 or, for one layer, 5,; got {text!r}."
        )
    return layers


def method_text(method: str, config: Mapping[str, Any]) -> str:
    """A method and settings as typed: ``gna:window=18x24x24,stride=4``."""
    settings = ",".join(f"{key}={value_text(value)}" for key, value in config.items())
    return f"{method}:{settings}" if settings else method


def _word_text(value: object) -> str:
    """The value of a word as typed; layers are written ``0,3`` or ``5,``."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    return f"{value[0]}," if len(value) == 1 else ",".join(map(str, value))


def _config(method: str, settings: Any) -> Any:
    if not isinstance(settings, dict):
        raise DitAccelError(f"The settings of a layer are an object of {method}'s settings, or null; got {settings!r}.")
    return make_config(method, settings)


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
