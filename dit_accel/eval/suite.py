"""Suites: an evaluation written down in YAML, so that it can be run again as it was.

    model: demo
    prompts: demo            # a file, a built-in list or a folder
    seeds: [0]
    steps: 8
    frames: 9
    methods:
      - gna:window=0.5
      - {method: "radial:decay=0.2", dense_steps: 2}
      - {load: trained/sla}
    require: psnr>=15

The keys are the options of `dit-accel eval`; an option on the command line wins over the suite's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.generation.choice import Choice, choose
from dit_accel.generation.sources import first_line
from dit_accel.registry import did_you_mean

SUITES = Path(__file__).parent / "suites"
METHOD_KEYS = ("method", "load", "dense_steps", "dense_last_steps", "dense_layers")
LISTS = ("seeds", "methods", "metrics", "pipe")


def built_in() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read(source: str, options: Mapping[str, type]) -> dict[str, Any]:
    """Read a suite.

    Args:
        source: a YAML file, or the name of a built-in suite.
        options: what a suite may say, and the type of each value; a list holds values of that type.

    Returns:
        The values by option; methods are ready to use.

    Raises:
        DitAccelError: there is no such suite, it is not YAML, a key is unknown, or a value is of another type.
    """
    import yaml

    path = SUITES / f"{source}.yaml" if source in built_in() else Path(source).expanduser()
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DitAccelError(
            f"--suite {source}: there is no such file, and no built-in suite of that name."
            f"{did_you_mean(source, built_in())} Built-in suites: {', '.join(built_in())}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DitAccelError(f"--suite {source} cannot be read: {first_line(error)}.") from error
    except yaml.YAMLError as error:
        raise DitAccelError(f"--suite {source} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(said, dict):
        raise DitAccelError(f"--suite {source} should hold keys and values, such as model: demo; it holds {said!r}.")
    return {key: _value(source, key, value, options) for key, value in said.items()}


def _value(source: str, key: str, value: Any, options: Mapping[str, type]) -> Any:
    if key not in options:
        raise DitAccelError(
            f"--suite {source}: unknown key {key!r}.{did_you_mean(str(key), options)} Keys: {', '.join(options)}."
        )
    if key in LISTS:
        value = value if isinstance(value, list) else [value]
        return methods(value) if key == "methods" else [_typed(source, key, item, options[key]) for item in value]
    return _typed(source, key, value, options[key])


def _typed(source: str, key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DitAccelError(f"--suite {source}: {key} should be of type {kind.__name__}, got {value!r}.")
    least = 0 if key in ("seeds", "pictures") else 1
    if kind is int and isinstance(value, int) and value < least:
        raise DitAccelError(f"--suite {source}: {key} should be at least {least}, got {value}.")
    return value


def methods(listed: Iterable[Any]) -> list[Choice]:
    """Methods from their entries in a suite: text, or a mapping with a schedule or a saved accelerator.

    Raises:
        DitAccelError: an entry is neither, or what it says is refused.
    """
    found = []
    for entry in listed:
        said = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(said, dict) or not set(said) <= set(METHOD_KEYS) or not said.keys() & {"method", "load"}:
            raise DitAccelError(
                f"A method of a suite is text, or has method or load among the keys {', '.join(METHOD_KEYS)}; got "
                f"{entry!r}."
            )
        texts = {key: _text(value) for key, value in said.items()}
        load = Path(texts["load"]) if "load" in texts else None
        first, last, layers = (texts.get(key) for key in METHOD_KEYS[2:])
        found.append(choose(texts.get("method"), None, load, first, last, layers))
    return found


def _text(value: Any) -> str:
    """As it is typed on the command line; each layer has a comma behind it, so that one is no number of layers."""
    return "".join(f"{item}," for item in value) if isinstance(value, list) else str(value)
