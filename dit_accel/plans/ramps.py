"""Settings that change over the sparse steps of a run, such as ``tau=1.3..0.8``: evenly from one value to another.

A ramp has one form in Python, on the command line and in files: the text of both values with two dots between them.
``window=18x24x24..9x12x12`` has values per axis, and numbers of tokens stay whole. A `Config` always is of one step.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from dit_accel.errors import DitAccelError

DOTS = ".."
PLACES = 100  # between the ends, so that a server with runs of any length has a bounded number of Configs and plans
DIGITS = 6  # of a value between the ends


@dataclasses.dataclass(frozen=True)
class Ramped:
    """Settings of a method that change from step to step.

    Args:
        first, last: the Configs of the first and of the last sparse step. They differ in settings that may be ramps.
    """

    first: Any
    last: Any

    def at(self, place: float) -> Any:
        """The Config of a step that lies there between the first sparse step, 0, and the last, 1; see `PLACES`."""
        place = round(place * PLACES) / PLACES
        if place in (0, 1):
            return self.last if place else self.first
        pairs = {name: (getattr(self.first, name), getattr(self.last, name)) for name in self.names}
        return dataclasses.replace(self.first, **{name: _between(*pair, place) for name, pair in pairs.items()})

    @property
    def names(self) -> list[str]:
        """The settings that change."""
        names = (field.name for field in dataclasses.fields(self.first))
        return [name for name in names if getattr(self.first, name) != getattr(self.last, name)]

    def settings(self, text: Callable[[Any], str]) -> dict[str, str]:
        """The settings that change, as typed; `text` writes a value."""
        return {name: text(getattr(self.first, name)) + DOTS + text(getattr(self.last, name)) for name in self.names}


def at(config: Any, place: float = 0.0) -> Any:
    """The Config of a place, as of `Ramped.at`, of settings with or without ramps."""
    return config.at(place) if isinstance(config, Ramped) else config


def ends(config: Any) -> tuple[Any, ...]:
    """The Configs of the first and of the last sparse step; one if they are the same."""
    return (config.first, config.last) if isinstance(config, Ramped) else (config,)


def of_all_steps(config: Any, subject: str) -> Any:
    """The Config of settings without a ramp; others are refused for the `subject`."""
    if isinstance(config, Ramped):
        raise DitAccelError(
            f"{subject} is the same in all steps, and {', '.join(config.names)} is a ramp. Give it one value."
        )
    return config


def allowed(kind: type) -> list[str]:
    """The settings of a Config's class that may be ramps."""
    options = {field.name: field.metadata.get("option") for field in dataclasses.fields(kind)}
    return [name for name, option in options.items() if option is not None and option.ramps]


def configured(kind: type, settings: Mapping[str, Any], parse: Callable[[str], Any]) -> Any:
    """A Config, or a `Ramped` if a value is a ramp.

    Args:
        kind: the Config's class; its options say which settings may be ramps.
        parse: makes a setting's value from its text.

    Raises:
        DitAccelError: a setting may not be a ramp, a ramp goes from tokens to a share, or an end is refused.
    """
    pairs = {name: pair for name, value in settings.items() if (pair := _read(value, parse)) is not None}
    if not pairs:
        return kind(**settings)
    may, hints = allowed(kind), typing.get_type_hints(kind)
    for name, pair in pairs.items():
        if name not in may:
            raise DitAccelError(
                f"{name} has one value for all steps, got the ramp {settings[name]!r}. "
                + (f"Ramps may be: {', '.join(may)}." if may else "This method takes no ramps.")
            )
        if int not in _kinds(hints[name]):
            pairs[name] = tuple(_floats(value) for value in pair)
        elif len({type(number) for value in pair for number in _axes(value)}) > 1:
            raise DitAccelError(
                f"A ramp goes from tokens to tokens or from a share to a share; got {settings[name]!r}."
            )
    first, last = (kind(**{**settings, **{name: pair[end] for name, pair in pairs.items()}}) for end in (0, 1))
    return first if first == last else Ramped(first, last)


def _read(value: Any, parse: Callable[[str], Any]) -> tuple[Any, Any] | None:
    """Both values of a ramp's text; None for any other value."""
    if not isinstance(value, str) or DOTS not in value:
        return None
    first, last = (parse(side.strip()) for side in value.split(DOTS, 1))
    numbers = all(type(number) in (int, float) for side in (first, last) for number in _axes(side))
    return (first, last) if numbers and len(_axes(first)) in (1, len(_axes(last))) else None


def _axes(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _floats(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


def _between(first: Any, last: Any, place: float) -> Any:
    if isinstance(last, tuple):
        starts = first if isinstance(first, tuple) else (first,) * len(last)
        return tuple(_between(*pair, place) for pair in zip(starts, last, strict=True))
    value = first + (last - first) * place
    return math.floor(value + 0.5) if isinstance(first, int) else round(value, DIGITS)


def _kinds(hint: Any) -> set[Any]:
    """The types in an annotation, without those that hold them."""
    inner = typing.get_args(hint)
    return set().union(*map(_kinds, inner)) if inner else {hint}
