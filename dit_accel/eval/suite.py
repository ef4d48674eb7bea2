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
    require: psnr>=15

The keys are the options of `dit-accel eval`; an option on the command line wins over the suite's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_accel import values
from dit_accel.errors import DitAccelError
from dit_accel.eval.request import EvalRequest
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.request import MethodOptions

SUITES = Path(__file__).parent / "suites"
METHOD_KEYS = ("method", "load", "settings", "dense_steps", "dense_last_steps", "dense_layers", "dense_backend")


def read(source: str) -> dict[str, Any]:
    """The values of a suite, a YAML file or a built-in name, by field of `EvalRequest`; methods are ready to use.

    Raises:
        DitAccelError: there is no such suite, it is not YAML, a key is unknown, or a value is of another type.
    """
    said = values.read_yaml(source, SUITES, "suite")
    if isinstance(said.get("methods"), str | dict):
        said["methods"] = [said["methods"]]
    try:
        if "methods" in said:
            said["methods"] = methods(said["methods"])
        request = values.build(EvalRequest, said, "An evaluation")
    except DitAccelError as error:
        raise DitAccelError(f"--suite {source}: {error}") from error
    return {name: getattr(request, name) for name in said}


def methods(listed: Iterable[Any]) -> list[Candidate]:
    """Methods from their entries in a suite: text, or a mapping with a schedule or a saved accelerator."""
    candidates = []
    for entry in listed:
        said = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(said, dict) or not set(said) <= set(METHOD_KEYS) or not said.keys() & {"method", "load"}:
            raise DitAccelError(
                f"A method of a suite is text, or has method or load among the keys {', '.join(METHOD_KEYS)}; got "
                f"{entry!r}."
            )
        candidates.append(values.build(MethodOptions, said, "A method of a suite").candidate())
    return candidates
