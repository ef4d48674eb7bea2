"""Settings as dataclasses: a field states its type, range and help once, for Python, YAML and the command line.

`option` adds help and limits to a field's annotation. A `Checked` dataclass refuses what does not fit; rules about
several fields follow in its `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError, first_line
from dit_accel.registry import did_you_mean, refuse_unknown

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
WORDS[type(None)] = "none"


MOST_VALUES = 100_000  # in a YAML file, aliases unfolded


@dataclasses.dataclass(frozen=True)
class Option:
    """A field's metadata besides its annotation and default.

    Args:
        help: one sentence.
        flag: its name on the command line; None: from the field's name.
        metavar: the placeholder of its value in the command line's help.
        least, above, most, below: limits of a number; `above` and `below` are exclusive.
        parse: makes the value from the command line's text, or from all texts of a `repeatable` option.
        repeatable: the command line takes the option several times.
        typed: the command line has the option; YAML always has it.
        positional: the command line takes it by its place, without a name.
        ramps: the setting of a method may change over the steps of a run, see `dit_accel.plans.ramps`.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    parse: Callable[[Any], Any] | None = None
    repeatable: bool = False
    typed: bool = True
    positional: bool = False
    ramps: bool = False


def option(default: Any, help: str = "", **more: Any) -> Any:
    """A dataclass field with help and the further arguments of `Option`; a docstring may explain it instead of help.

    A `default` that is a mapping is copied, a class called for every instance; MISSING: none.
    """
    metadata = {"option": Option(help, **more)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(field: dataclasses.Field[Any]) -> str:
    """A field's name on the command line, such as ``--dense-steps``."""
    flag = field.metadata["option"].flag if "option" in field.metadata else None
    return flag or f"--{field.name.replace('_', '-')}"


def build(kind: type, plain: Any, subject: str) -> Any:
    """A dataclass from plain values, such as YAML's; `subject` is that of an error's sentence.

    Lists become tuples, text becomes paths, mappings become dataclasses, and one value becomes a tuple of one.

    Raises:
        DitAccelError: `plain` is no mapping, a name is unknown, or the dataclass refuses a value.
    """
    if not isinstance(plain, Mapping):
        raise DitAccelError(f"{subject} needs settings by name, got {plain!r}.")
    hints = typing.get_type_hints(kind)
    refuse_unknown(plain, [field.name for field in dataclasses.fields(kind)], subject)
    return kind(**{name: _converted(value, hints[name], name) for name, value in plain.items()})


def names_in(folder: Path) -> list[str]:
    """Names of the YAML files of a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(source: str, folder: Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file: a path, or a name among those of `folder`, which come with the package.

    Raises:
        DitAccelError: there is no such `kind` of file, as "recipe"; it cannot be read, is not YAML or holds no mapping.
    """
    known = names_in(folder)
    path = folder / f"{source}.yaml" if source in known else Path(source).expanduser()
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DitAccelError(
            f"There is no {kind} {source}.{did_you_mean(source, known)} Give a YAML file or one of: {', '.join(known)}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DitAccelError(f"The {kind} {source} cannot be read: {first_line(error)}.") from error
    except RecursionError as error:
        raise DitAccelError(f"The {kind} {source} is nested too deeply. Write its lists and mappings flat.") from error
    except ValueError as error:
        raise DitAccelError(f"The {kind} {source} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise DitAccelError(f"The {kind} {source} should hold keys and values, such as model: demo; got {content!r}.")
    return content


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError or RecursionError where it is none, names a key twice or unfolds too far."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    finally:
        loader.dispose()


def _check_node(node: Any, sizes: dict[Any, int]) -> int:
    """The number of values below a node with its aliases unfolded; `sizes` has those of nodes seen before."""
    if node not in sizes:
        sizes[node] = MOST_VALUES  # of a node that contains itself
        below = node.value if isinstance(node.value, list) else []
        if pairs := [pair for pair in below if isinstance(pair, tuple)]:
            names = [key.value for key, _ in pairs if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{name} is there twice{node.start_mark}; leave one out")
            below = [part for pair in pairs for part in pair]
        sizes[node] = 1 + sum(_check_node(part, sizes) for part in below)
    if sizes[node] >= MOST_VALUES:
        raise ValueError(f"its aliases unfold to more than {MOST_VALUES:,} values; write them out")
    return sizes[node]


def _converted(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        return build(hint, value, name)
    kinds = (hint, *typing.get_args(hint))
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    value = _frozen(value)
    return (value,) if not fits(value, hint) and fits((value,), hint) else value


def _frozen(value: Any) -> Any:
    """The value with tuples for lists, in mappings too; YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def record(settings: Any) -> dict[str, Any]:
    """A dataclass as plain values for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}


class Checked:
    """The base of dataclasses that raise a `DitAccelError` if a value does not fit its annotation and limits."""

    def __post_init__(self) -> None:
        check(self)


def check(settings: Any) -> None:
    """Refuse a dataclass with a field whose value does not fit its annotation and limits."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if isinstance(value, float) and not math.isfinite(value):
            raise DitAccelError(f"{field.name} must be finite, got {value}.")
        if not fits(value, hint):
            raise DitAccelError(f"{field.name} must be {in_words(hint)}, got {value!r}.")
        if "option" in field.metadata:
            _check_limits(field.name, field.metadata["option"], value)


def _check_limits(name: str, limits: Option, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        for words, holds, limit in (
            ("at least", operator.ge, limits.least),
            ("above", operator.gt, limits.above),
            ("at most", operator.le, limits.most),
            ("below", operator.lt, limits.below),
        ):
            if limit is not None and not holds(number, limit):
                raise DitAccelError(f"{name} must be {words} {limit}, got {value!r}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation; a bool is no number, and an int is a float."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    kind: Any = origin or hint
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in inner)
    if origin is typing.Literal:
        return value in inner
    if hint is Any or not isinstance(kind, type):
        return True
    of_kind = isinstance(value, (int, float) if kind is float else kind)
    if not of_kind or isinstance(value, bool):
        return of_kind and kind is bool
    if kind is tuple and inner:
        wanted = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(wanted) and all(map(fits, value, wanted))
    if isinstance(value, Mapping) and inner:
        return all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    return kind is not list or not inner or all(fits(item, inner[0]) for item in value)


def in_words(hint: Any) -> str:
    """An annotation as an error says it: ``a whole number or none``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(in_words, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        words = in_words(inner[0])
        return f"a list, each {words}" if inner[-1] is ... else f"a list of {len(inner)}: {words}"
    if origin is not None:
        return "settings by name"
    return WORDS.get(hint, "settings by name")
