"""Command line options from dataclasses: one field is one option, with the field's help, default and limits."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dit_accel import values

Verb = Callable[..., int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOptions(values.Checked):
    """The format of a verb's output."""

    json: bool = values.option(False, "Print JSON instead of a table.")


def command(*groups: type) -> Callable[[Verb], Verb]:
    """Give a verb the options of dataclasses.

    The verb is called with one dictionary a dataclass: the values on the command line, by field. Other values are the
    dataclass's defaults, or come from a recipe or a suite.

    Args:
        groups: dataclasses whose fields are made with `dit_accel.values.option`. A class attribute `PANEL` is the
            title above its own options in the help.
    """
    listed = [(group, field) for group in groups for field in _typed(group)]
    hints = {group: typing.get_type_hints(group) for group in groups}

    def decorate(function: Verb) -> Verb:
        def verb(context: typer.Context, **typed: Any) -> int | None:
            given: dict[type, dict[str, Any]] = {group: {} for group in groups}
            for group, field in listed:
                source = context.get_parameter_source(field.name)
                if source is not None and source.name == "COMMANDLINE":
                    given[group][field.name] = _value(field.metadata["option"], typed[field.name])
            return function(*given.values())

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
        for group, field in listed:
            annotation = _annotation(group, field, hints[group][field.name])
            parameters.append(inspect.Parameter(field.name, kind, default=_default(field), annotation=annotation))
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {}
        verb.__name__, verb.__doc__ = function.__name__, function.__doc__
        return verb

    return decorate


def _typed(group: type) -> list[dataclasses.Field[Any]]:
    """The options of a dataclass: its own, then those of its bases in their order."""
    marked = [field for field in dataclasses.fields(group) if "option" in field.metadata]
    typed = [field for field in marked if field.metadata["option"].typed]
    return sorted(typed, key=lambda field: group.__mro__.index(_owner(group, field.name)))


def _owner(group: type, name: str) -> type:
    """The dataclass that declares a field."""
    return next(kind for kind in group.__mro__ if name in vars(kind).get("__annotations__", ()))


def _value(option: values.Option, typed: Any) -> Any:
    if option.parse is not None:
        return option.parse(typed)
    return tuple(typed) if isinstance(typed, list) else typed


def _default(field: dataclasses.Field[Any]) -> Any:
    """For the help alone; see `command`."""
    if field.default is dataclasses.MISSING:
        return None if field.default_factory is not dataclasses.MISSING else inspect.Parameter.empty
    return None if _is_text(field) else field.default


def _is_text(field: dataclasses.Field[Any]) -> bool:
    """Whether the field's value is made from the command line's text."""
    option = field.metadata["option"]
    return option.parse is not None or option.repeatable


def _annotation(group: type, field: dataclasses.Field[Any], hint: Any) -> Any:
    option: values.Option = field.metadata["option"]
    if option.parse is not None:
        hint = list[str] if option.repeatable else str
    elif typing.get_origin(hint) is tuple:
        hint = list[typing.get_args(hint)[0]]  # type: ignore[misc]
    if _is_text(field):
        hint = hint | None
    shown = _shown(field.default) if _is_text(field) else True
    about: dict[str, Any] = {
        "help": option.help.replace("[", r"\["),  # no markup
        "metavar": option.metavar,
        "min": None if _is_text(field) else option.least,
        "max": None if _is_text(field) else option.most,
        "show_default": shown,
        "rich_help_panel": vars(_owner(group, field.name)).get("PANEL"),
    }
    return Annotated[hint, typer.Argument(**about) if option.positional else typer.Option(values.flag(field), **about)]


def _shown(default: Any) -> str | bool:
    """The default of an option made from text, as the help shows it."""
    if default is dataclasses.MISSING or default is None or default == ():
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
