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
    dataclass's defaults, or come from a recipe or a suite. Fields are made with `dit_accel.values.option`. A class
    attribute `PANEL` is the title above its own options in the help.
    """
    listed = [(group, field) for group in groups for field in _typed(group)]
    hints = {group: typing.get_type_hints(group) for group in groups}

    def decorate(function: Verb) -> Verb:
        def verb(context: typer.Context, **typed: Any) -> int | None:
            by_group: dict[type, dict[str, Any]] = {group: {} for group in groups}
            for group, field in listed:
                source = context.get_parameter_source(field.name)
                if source is not None and source.name == "COMMANDLINE":
                    by_group[group][field.name] = _value(field.metadata["option"], typed[field.name])
            return function(*by_group.values())

        parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for group, field in listed:
            parameters.append(_parameter(group, field, hints[group][field.name]))
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


def _parameter(group: type, field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """An option as a parameter of its verb. Its default is for the help alone; see `command`."""
    option: values.Option = field.metadata["option"]
    default: Any = field.default
    from_text = option.parse is not None or option.repeatable  # from the command line's text
    if option.parse is not None:
        hint = list[str] if option.repeatable else str
    elif typing.get_origin(hint) is tuple:
        hint = list[typing.get_args(hint)[0]]  # type: ignore[misc]
    if from_text:
        hint = hint | None
    if default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        default = inspect.Parameter.empty
    elif default is dataclasses.MISSING or default == ():
        default = None
    elif from_text and default is not None:
        written = [str(part) for part in default] if isinstance(default, tuple) else [str(default)]
        default = written if option.repeatable else ",".join(written)
    about: dict[str, Any] = {
        "help": option.help.replace("[", r"\["),  # no markup
        "metavar": option.metavar,
        "min": None if from_text else option.least,
        "max": None if from_text else option.most,
        "rich_help_panel": vars(_owner(group, field.name)).get("PANEL"),
    }
    typed = typer.Argument(**about) if option.positional else typer.Option(values.flag(field), **about)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[hint, typed])
