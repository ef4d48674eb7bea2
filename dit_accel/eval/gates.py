"""Limits that a method has to keep, so that CI can hold a line: ``psnr>=25,speedup>=1.5``."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
LIMIT = re.compile(rf"\s*(?P<figure>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>{NUMBER})\s*")

# Figures beside the metrics, by which a method can be held to a limit.
FIGURES = ("speedup", "attention_speedup", "density", "loop_seconds", "attention_seconds", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one figure has to be.

    Args:
        figure: its name.
        sign: one of `COMPARE`.
        bound: the number it is compared with.
    """

    figure: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.bound:g}"


def parse(text: str) -> list[Limit]:
    """Read limits with commas between them.

    Raises:
        DitAccelError: one is not written as figure, sign and number.
    """
    limits = []
    for part in text.split(","):
        found = LIMIT.fullmatch(part)
        if found is None:
            raise DitAccelError(
                f"--require takes figure, sign and number, such as psnr>=25,speedup>=1.5; got {part.strip()!r}."
            )
        limits.append(Limit(found["figure"], found["sign"], float(found["bound"])))
    return limits


def check_names(limits: Collection[Limit], known: Collection[str]) -> None:
    """Check before the work that every limit's figure will be there.

    Raises:
        DitAccelError: one will not; the message suggests the nearest.
    """
    for limit in limits:
        if limit.figure not in known:
            raise DitAccelError(
                f"--require {limit}: there is no figure {limit.figure!r}.{did_you_mean(limit.figure, known)} "
                f"This run has: {', '.join(known)}."
            )


def figures_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a summary's row, metrics and `FIGURES`, by name; None where one was not measured."""
    found = {name: figure["value"] for name, figure in row["figures"].items()}
    for name in FIGURES:
        found[name] = row[name]["p50"] if isinstance(row[name], dict) else row[name]
    return {name: None if value is None else float(value) for name, value in found.items()}


def broken(limits: Collection[Limit], figures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The limits that do not hold, a line each; a figure that is missing breaks its limits.

    Args:
        limits: to be kept by every method.
        figures: by the method's label and the figure's name.
    """
    remarks = []
    for label, own in figures.items():
        for limit in limits:
            value = own[limit.figure]
            if value is None:
                remarks.append(f"{label}: {limit} was asked for, and this run has no such figure")
            elif not COMPARE[limit.sign](value, limit.bound):
                remarks.append(f"{label}: {limit} was asked for, and it is {value:.4g}")
    return remarks
