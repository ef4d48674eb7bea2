"""MagCache's magnitude ratios: published ones, calibrations in JSON files, and one number for all steps.

A ratio belongs to a step: the norm of the blocks' residual there over the norm one step earlier, the mean over tokens.
It depends on model, guidance branch and number of steps; ratios of another number of steps are taken from the nearest.

A calibration file holds ``{"source": text, "cond": [ratio of each step], "uncond": [...]}``; without "uncond" every
branch has the ratios of "cond".

Source: MagCache, arXiv:2506.09045, whose repository (Apache 2.0) has the published ratios in `mag_ratios.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError, first_line
from dit_accel.files import MARK, replace_file
from dit_accel.pipelines.levels import is_named
from dit_accel.registry import did_you_mean

ASSUMED = 0.98
FILE = Path(__file__).parent / "mag_ratios.json"


@dataclasses.dataclass(frozen=True)
class MagRatios:
    """Ratios by step.

    Args:
        cond: of the guided branch, and of every call that holds both.
        uncond: of the other branch; empty: as `cond`.
        source: where they come from.
    """

    cond: tuple[float, ...]
    uncond: tuple[float, ...] = ()
    source: str = "given"

    def __post_init__(self) -> None:
        for ratio in (*self.cond, *self.uncond):
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
                raise DitAccelError(f"mag_ratios are numbers above 0, got {ratio!r}.")
        if not self.cond:
            raise DitAccelError("mag_ratios are one number for all steps or one for each, got none.")

    def of(self, branch: str) -> tuple[float, ...]:
        """The ratios of a branch: the unguided one is the second call of a step, or "pred_uncond" of a guider."""
        return self.uncond if self.uncond and branch in ("uncond", "pred_uncond", "call 1") else self.cond

    def save(self, path: Path, **about: Any) -> None:
        """Write a calibration file, with what `about` says of it."""
        record = {
            "note": MARK,
            "source": self.source,
            **about,
            "cond": self.cond,
            **({"uncond": self.uncond} if self.uncond else {}),
        }
        replace_file(path, f"{json.dumps(record, indent=1)}\n".encode())


@functools.cache
def published() -> Mapping[str, Mapping[str, Any]]:
    """Published ratios by name."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def names_a_file(value: Any) -> bool:
    """Whether a setting means a calibration file, rather than numbers, published ratios or none."""
    return isinstance(value, str) and value not in published()


def mag_ratios(value: Any, models: tuple[str, ...] = ()) -> MagRatios:
    """The ratios that a setting means.

    Args:
        value: a number, numbers, a name among `published`, or the path of a calibration file. None: those published for
            one of `models`, else `ASSUMED` for every step.
        models: names of the pipeline and its transformer, repositories or folders.

    Raises:
        DitAccelError: there is no such name and no such file, or it holds no ratios.
    """
    if value is None:
        for entry in published().values():
            if entry["match"] and is_named(entry["match"], models):
                return _from_record(entry)
        advice = "for this model none are published; `dit-accel tune --cache mag` measures them"
        return MagRatios((ASSUMED,), source=f"{ASSUMED} is assumed for every step: {advice}")
    if isinstance(value, (int, float)):
        return MagRatios((value,))
    if not isinstance(value, str):
        return MagRatios(tuple(value))
    if value in published():
        return _from_record(published()[value])
    try:
        record = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        return _from_record({"source": str(value), **record})
    except FileNotFoundError as error:
        raise DitAccelError(
            f"mag_ratios={value} is no file and no published set.{did_you_mean(value, published())} Published: "
            f"{', '.join(published())}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DitAccelError(f"mag_ratios={value} holds no calibration: {first_line(error)}") from error


def _from_record(record: Mapping[str, Any]) -> MagRatios:
    return MagRatios(tuple(record["cond"]), tuple(record.get("uncond", ())), str(record["source"]))
