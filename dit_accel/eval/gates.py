"""Limits that a method has to keep, so that CI can hold a line: ``psnr>=25,speedup>=1.5``."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Collection, Mapping

from dit_accel.errors import DitAccelError
from dit_accel.registry import did_you_mean

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
LIMIT = re.compile(rf"\s*(?P<figure>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>{NUMBER})\s*")


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

    def holds(self, value: float) -> bool:
        return bool(COMPARE[self.sign](value, self.bound))


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
    """See before the work that every figure will be there.

    Raises:
        DitAccelError: one will not; the message suggests the nearest.
    """
    for limit in limits:
        if limit.figure not in known:
            raise DitAccelError(
                f"--require {limit}: there is no figure {limit.figure!r}.{did_you_mean(limit.figure, known)} "
                f"This run has: {', '.join(known)}."
            )


def broken(limits: Collection[Limit], figures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """What does not hold, a line each; a figure that is missing does not hold.

    Args:
        limits: to be kept by every method.
        figures: by the method's label and the figure's name.
    """
    remarks = []
    for label, own in figures.items():
        for limit in limits:
            value = own[limit.figure]
            if value is None:
                remarks.append(f"{label}: {limit} was asked for, and there is no figure")
            elif not limit.holds(value):
                remarks.append(f"{label}: {limit} was asked for, it is {value:.4g}")
    return remarks
