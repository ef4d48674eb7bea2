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
      - {load: clear_local_16.safetensors, settings: [radius=16]}
      - {level: fast}
      - method: sol
        dense_steps: 0.2
        published: {name: Sol-Attn, where: H100, speedup: 2.02, source: "arXiv:2607.24027"}
    published:               # of methods that are not run here
      - {name: SLA, where: RTX 5090, speedup: 2.2, source: "arXiv:2509.24006"}
    require: psnr>=15

The keys are the options of `dit-accel eval`; an option on the command line wins over the suite's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_accel import values
from dit_accel.errors import DitAccelError
from dit_accel.eval.published import Published
from dit_accel.eval.request import EvalRequest
from dit_accel.generation import sources
from dit_accel.generation.candidate import Candidate, told_apart
from dit_accel.generation.request import MethodOptions, Subject

SUITES = Path(__file__).parent / "suites"
METHOD_KEYS = (
    "method", "load", "level", "preset", "cache", "settings", "dense_steps", "dense_last_steps", "dense_layers",
    "dense_backend",
)  # fmt: skip


def read(source: str, typed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a suite, a YAML file or a built-in name, by field of `EvalRequest`; methods are ready to use.

    Values in `typed` win over the suite's: levels and presets are chosen for the model and size that come of both.

    Raises:
        DitAccelError: there is no such suite, it is not YAML, a key is unknown, or a value is of another type.
    """
    said = values.read_yaml(source, SUITES, "suite")
    listed, shown = said.pop("methods", None), said.pop("published", None)
    try:
        listed = None if listed is None else _entries("methods", listed)
        shown = _entries("published", shown)
        request = values.build(EvalRequest, said, "An evaluation")
        settings = {name: getattr(request, name) for name in said}
        if listed is None and not shown:
            return settings
        whole = EvalRequest(**(settings | dict(typed or {})))
        candidates, figures = methods(listed, lambda: whole.subject(sources.find(whole.model, whole.revision)))
        figures += [Published.build(entry, "") for entry in shown]
        if listed is not None:
            settings["methods"] = tuple(candidates)
        if figures:
            settings["published"] = tuple(figures)
    except DitAccelError as error:
        raise DitAccelError(f"--suite {source}: {error}") from error
    return settings


def methods(
    listed: Iterable[Any] | None, subject: Callable[[], Subject] | None = None
) -> tuple[list[Candidate], list[Published]]:
    """Methods from their entries in a suite, and the published figures beside them.

    An entry is text, or a mapping with a schedule, a saved accelerator or a level; `subject` is what a level is for.
    """
    candidates, figures = [], []
    for entry in listed or ():
        said = {"method": entry} if isinstance(entry, str) else entry
        said = dict(said) if isinstance(said, dict) else {}
        shown = said.pop("published", None)
        if not set(said) <= set(METHOD_KEYS) or not said.keys() & {"method", "load", "level"}:
            raise DitAccelError(
                f"A method of a suite is text, or has method, load or level among the keys {', '.join(METHOD_KEYS)}; "
                f"got {entry!r}."
            )
        candidate = values.build(MethodOptions, said, "A method of a suite").candidate(subject)
        candidates.append(candidate)
        figures.append(_entries("published", shown))
    apart = told_apart(candidates)
    labelled = zip(apart, figures, strict=True)
    return apart, [Published.build(one, candidate.label) for candidate, entries in labelled for one in entries]


def _entries(key: str, value: Any) -> list[Any]:
    """The entries of a suite's key: a list, one entry alone, or none."""
    if not isinstance(value, list | dict | str | None):
        raise DitAccelError(f"{key} must be a list of entries, got {value!r}.")
    return value if isinstance(value, list) else [] if value is None else [value]
