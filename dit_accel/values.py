"""Dataclasses from plain values, such as a recipe's, the command line's or a saved file's: names and kinds are checked.

What a field may hold is its annotation; ranges are the business of each dataclass.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}


def build(kind: type, values: Any, what: str) -> Any:
    """A dataclass from values by name.

    Args:
        kind: the dataclass.
        values: of its fields.
        what: they are settings of, for an error.

    Raises:
        DitAccelError: they are no mapping, a name is unknown, or the dataclass refuses a value.
    """
    if not isinstance(values, Mapping):
        raise DitAccelError(f"{what} takes settings by name, got {values!r}.")
    names = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise DitAccelError(
                f"{what} has no setting {name!r}.{did_you_mean(str(name), names)} It has: {', '.join(names)}."
            )
    return kind(**values)


def check(settings: Any) -> None:
    """See that every field of a dataclass holds what its annotation says.

    Raises:
        DitAccelError: one does not.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not _fits(value, hints[field.name]):
            raise DitAccelError(f"{field.name} is {_words(hints[field.name])}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is types.UnionType:
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    if origin is not None:  # a mapping
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, origin) and all(_fits(key, inner[0]) and _fits(own, inner[1]) for key, own in pairs)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(map(_words, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each {_words(inner[0])}" if inner[-1] is ... else f"a list of {len(inner)}: {_words(inner[0])}"
    if origin is not None:
        return "settings by name"
    return WORDS.get(hint, "settings by name")
