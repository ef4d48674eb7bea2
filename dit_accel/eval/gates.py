"""Limits on a method's figures, for CI: ``psnr>=25,speedup>=1.5``."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
LIMIT = re.compile(rf"\s*(?P<figure>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>{NUMBER})\s*")

# figures besides the metrics that can have limits
FIGURES = ("speedup", "attention_speedup", "density", "loop_seconds", "attention_seconds", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit on the figure of that name: `sign` is one of `COMPARE`."""

    figure: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.bound:g}"


def parse(text: str, option: str = "--require") -> list[Limit]:
    """Read limits with commas between them; `option` is the one that has them."""
    limits = []
    for part in text.split(","):
        match = LIMIT.fullmatch(part)
        if match is None:
            raise DitAccelError(f"{option} takes limits such as psnr>=25,speedup>=1.5; got {part.strip()!r}.")
        if not math.isfinite(float(match["bound"])):
            raise DitAccelError(f"{option} {part.strip()}: {match['bound']} is not finite; give a smaller number.")
        limits.append(Limit(match["figure"], match["sign"], float(match["bound"])))
    return limits


def check_names(limits: Collection[Limit], known: Collection[str]) -> None:
    """Refuse limits on figures that the run will not have; the message suggests the nearest."""
    for limit in limits:
        if limit.figure not in known:
            raise DitAccelError(
                f"--require {limit}: there is no figure {limit.figure!r}.{did_you_mean(limit.figure, known)} "
                f"This run has: {', '.join(known)}."
            )


def figures_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a summary's row, metrics and `FIGURES`, by name; None if not measured."""
    values = {name: figure["value"] for name, figure in row["figures"].items()}
    for name in FIGURES:
        values[name] = row[name]["p50"] if isinstance(row[name], dict) else row[name]
    return {name: None if value is None else float(value) for name, value in values.items()}


def broken(limits: Collection[Limit], figures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The broken limits, a line each; a missing figure breaks its limits. Figures are by method's label and name."""
    remarks = []
    for label, values in figures.items():
        for limit in limits:
            value = values[limit.figure]
            if value is None:
                remarks.append(f"{label}: {limit} does not hold, because this run did not measure it")
            elif not COMPARE[limit.sign](value, limit.bound):
                remarks.append(f"{label}: {limit} does not hold: it is {value:.4g}")
    return remarks
