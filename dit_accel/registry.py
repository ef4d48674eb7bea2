"""Methods and model families by name. A new one is a new file in its folder; nothing here changes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import pkgutil
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.plans import ramps

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.pipelines.family import Family
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid


DENSE = "dense"  # the method that leaves a model as it is


@functools.cache
def get_methods() -> Mapping[str, Method]:
    """Every method by name, sorted."""
    return {method.name: method for method in declared("methods", "METHOD")}


def learned_attributes() -> frozenset[str]:
    """Names of any method's learned weights on attention modules."""
    return frozenset(method.module.attribute for method in get_methods().values() if method.module is not None)


@functools.cache
def get_families() -> Mapping[str, Family]:
    """Every model family by name, sorted."""
    alone = declared("pipelines", "FAMILY")
    families = [*alone, *itertools.chain(*declared("pipelines", "FAMILIES"))]
    return {family.name: family for family in sorted(families, key=lambda family: family.name)}


def list_methods() -> list[str]:
    """Names of the attention methods."""
    return list(get_methods())


def list_families() -> list[str]:
    """Names of the supported model families."""
    return list(get_families())


def family_of(names: Iterable[str]) -> Family | None:
    """The family of a transformer, from the names of its class and bases, nearest first."""
    return next((family for name in names for family in get_families().values() if name in family.transformers), None)


def get_method(name: str) -> Method:
    """The method of that name; an error suggests the nearest one."""
    methods = get_methods()
    if not isinstance(name, str) or name not in methods:
        raise DitAccelError(
            f"Unknown method {name!r}.{did_you_mean(str(name), methods)} Methods: {', '.join(methods)}."
        )
    return methods[name]


def make_config(method: str, settings: Mapping[str, Any]) -> Any:
    """The method's Config, or a `Ramped` if a value is a ramp. Numbers of NumPy and PyTorch become Python's.

    Raises:
        DitAccelError: a setting is unknown or missing, or its value is refused.
    """
    config = get_method(method).config
    fields = {field.name: field for field in dataclasses.fields(config)}
    refuse_unknown(settings, fields, method)
    needed = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in settings]:
        example = f"{method}:{','.join(example_of(config, name) for name in missing)}"
        raise DitAccelError(f"{method} needs a value for {', '.join(missing)}, for example {example}; got none.")
    hints = typing.get_type_hints(config)
    values = {name: none_of(plain(value), hints[name]) for name, value in settings.items()}
    return ramps.configured(config, values, parse_value)


def plain(value: Any) -> Any:
    """Python's number for one of NumPy or PyTorch, a tuple for a tuple or list; any other value unchanged."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def plan(method: str, grid: TokenGrid, **config: Any) -> Plan:
    """The plan of a method on `grid`.

    Args:
        method: its name, or its name and settings as one types them: ``gna:window=18x24x24``.
        config: further settings, which win.

    Example:
        >>> grid = TokenGrid(frames=30, height=48, width=80, text=256)
        >>> plan("gna", grid, window=(18, 24, 24), stride=(16, 8, 8)).density
        0.0940...

    Raises:
        DitAccelError: the method or a setting is unknown, a setting is a ramp or does not fit the grid, or it is no
            `TokenGrid`.
    """
    from dit_accel.plans.plan import building
    from dit_accel.tokens import TokenGrid

    if not isinstance(grid, TokenGrid):
        raise DitAccelError(f"plan takes a grid such as TokenGrid(frames=4, height=8, width=8); got {grid!r}.")
    name, settings = parse_method(method) if isinstance(method, str) else (method, {})
    chosen = get_method(name)
    with building():
        return chosen.plan(grid, ramps.of_all_steps(make_config(name, settings | config), "A plan"))


def fields_of(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields of a method's settings: its own, then those that it shares with other methods."""
    names = list(vars(kind).get("__annotations__", ()))
    return sorted(
        dataclasses.fields(kind), key=lambda field: names.index(field.name) if field.name in names else len(names)
    )


def example_of(kind: type, name: str) -> str:
    """A setting of a method's settings as one types it, with another value than the default where there is a plain one.

    Example:
        >>> example_of(get_method("sol").config, "tau")
        'tau=0.5'
    """
    fields = {field.name: field for field in fields_of(kind)}
    hint, default = typing.get_type_hints(kind)[name], fields[name].default
    candidates: tuple[Any, ...] = (0.6, 128, (4, 4, 4))  # of None, of several types and of axes
    if default is dataclasses.MISSING:
        candidates = (2,)
    elif typing.get_origin(hint) is typing.Literal:
        candidates = tuple(choice for choice in typing.get_args(hint) if choice != default)
    elif isinstance(default, bool):
        candidates = (not default,)
    elif isinstance(default, (int, float)):
        candidates = (2 * default or 1,) if isinstance(default, int) else (default / 2 or 0.1,)
    required = {key: 2 for key, field in fields.items() if field.default is dataclasses.MISSING}
    for value in (*candidates, default):
        with contextlib.suppress(DitAccelError):
            kind(**required | {name: value})
            text = str(value).lower() if isinstance(value, bool) else str(value)
            return f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else text}"
    raise AssertionError(f"{kind.__module__} takes no example of {name}")


def settings_of(config: Any) -> dict[str, Any]:
    """A method's settings by name, in the order of `fields_of`; ramps as typed."""
    first = ramps.at(config)
    values = dataclasses.asdict(first) | (config.settings(value_text) if isinstance(config, ramps.Ramped) else {})
    return {field.name: values[field.name] for field in fields_of(type(first))}


def parse_method(text: str, settings: Iterable[str] = ()) -> tuple[str, dict[str, Any]]:
    """Read ``METHOD[:key=value,...]`` and further ``key=value`` strings, which win.

    Values are integers, decimals, true, false, none, words, or one of these per axis joined by x, as in ``18x24x24``.

    Example:
        >>> parse_method("gna:window=18x24x24", ["stride=16x8x8"])
        ('gna', {'window': (18, 24, 24), 'stride': (16, 8, 8)})

    Raises:
        DitAccelError: the method is unknown, an item is not ``key=value``, or one key comes twice in the text or in the
            strings.
    """
    name, _, rest = text.partition(":")
    get_method(name)
    return name, parse_settings(rest.split(",") if rest else (), name) | parse_settings(settings, name)


def parse_settings(items: Iterable[str], name: str) -> dict[str, Any]:
    """Read ``key=value`` strings of `name`, with values and errors as in `parse_method`."""
    parsed: dict[str, Any] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise DitAccelError(f"A setting is written key=value, such as topk=0.1 or window=18x24x24; got {item!r}.")
        if key in parsed:
            raise DitAccelError(f"The setting {key} of {name} is given twice. Give it once.")
        parsed[key] = parse_value(value)
    return parsed


def parse_value(text: str) -> Any:
    """A setting's value from its text; see `parse_method`."""
    axes = text.split("x")
    if len(axes) > 1 and all(axis == "full" or not isinstance(parse_value(axis), str) for axis in axes):
        return tuple(map(parse_value, axes))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def none_of(value: Any, hint: Any) -> Any:
    """None for the word "none" where a setting's annotation takes None and no words; any other value unchanged."""
    kinds = typing.get_args(hint)
    words = any(kind is str or typing.get_origin(kind) is typing.Literal for kind in kinds)
    return None if str(value).lower() == "none" and type(None) in kinds and not words else value


def value_text(value: object) -> str:
    """A setting's value as typed: ``18x24x24``, ``none``."""
    if value is None:
        return "none"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def refuse_unknown(settings: Iterable[Any], known: Collection[str], subject: str) -> None:
    """Refuse a setting that the `subject` does not have."""
    for name in settings:
        if name not in known:
            has = f"It has: {', '.join(known)}." if known else "It has no settings."
            raise DitAccelError(f"{subject} has no setting {name!r}.{did_you_mean(str(name), known)} {has}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known name, with a space before it, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def declared(folder: str, attribute: str) -> list[Any]:
    """That attribute of each module in a folder of the package, in the order of the modules' names."""
    path = importlib.import_module(f"dit_accel.{folder}").__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    modules = [importlib.import_module(f"dit_accel.{folder}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
