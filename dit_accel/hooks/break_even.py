"""The density above which the model's own attention is faster, measured by GPU architecture.

`dit-accel bench --break-even break_even.json` writes the measured table, which takes effect beside this file. None is
there: on an H200 every measured setting was faster than dense attention. Without a table no call is replaced. Only an
accelerator with `impl="auto"` on CUDA reads it; a kernel never computes dense attention in place of a sparse call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dit_accel.kernels import impls
from dit_accel.registry import get_method

TABLE = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """The break-even density of one method on one architecture.

    Args:
        arch: compute capability, such as "sm_90".
        method: registered name.
        head_dim, tokens: of the measured attention.
        density: share of all pairs at which both forward passes take equally long; 0 if dense was always faster.
        source: the file of benchmark rows and the commit that made them.
    """

    arch: str
    method: str
    head_dim: int
    tokens: int
    density: float
    source: str


@functools.cache
def load() -> tuple[BreakEven, ...]:
    """The measured table; empty without a file."""
    if not TABLE.exists():
        return ()
    return tuple(BreakEven(**fields) for fields in json.loads(TABLE.read_text(encoding="utf-8")))


def architecture(device: torch.device) -> str | None:
    """Compute capability of a GPU, such as "sm_90"; None where there is no CUDA."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dense_is_faster(device: torch.device, method: str, head_dim: int, tokens: int, density: float) -> str | None:
    """Why the model's own attention should be faster, by the entry with the nearest number of tokens; or None."""
    arch = architecture(device)
    known = [entry for entry in load() if (entry.arch, entry.method, entry.head_dim) == (arch, method, head_dim)]
    if not known:
        return None
    nearest = min(known, key=lambda entry: abs(math.log(tokens / entry.tokens)))
    if density <= nearest.density:
        return None
    return f"density {density:.4f} is above {nearest.density:.4f}, where dense is faster on {arch} ({nearest.source})"


def from_rows(rows: Iterable[dict[str, Any]], source: str) -> list[BreakEven]:
    """The table from forward rows of `dit-accel bench`, of the measured implementation that "auto" prefers on CUDA.

    There is one entry a method and size. The speed-up is interpolated as a power of the density, between the last
    density at which the method was faster and the next. A size whose speed-up never falls below 1 has no entry. Methods
    with learned weights have none either: they are never replaced.

    Args:
        rows: records with the fields of `dit_accel.bench.run`.
        source: their file.
    """
    preference = [row.name for row in impls.ranked("cuda") if "cuda" in row.rank]
    sizes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("direction") == "forward" and row["impl"] in preference and get_method(row["op"]).module is None:
            key = row["arch"], row["op"], row["head_dim"], row["tokens"]
            sizes.setdefault(key, []).append(row)
    entries = []
    for key, every in sorted(sizes.items()):
        best = min((row["impl"] for row in every), key=preference.index)
        measured = [row for row in every if row["impl"] == best]
        density = _crossing(sorted((row["density"], row["speedup"]) for row in measured))
        if density is not None:
            commits = ", ".join(sorted({str(row["git"]) for row in measured}))
            entries.append(BreakEven(*key, density=density, source=f"{source} at {commits}"))
    return entries


def _crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """The density above which the speed-up stays below 1; None if the last one is above, 0 if all are below."""
    density, speedup = points[-1]
    if speedup >= 1:
        return None
    for before, faster in reversed(points[:-1]):
        if faster >= 1:
            slope = math.log(density / before) / math.log(speedup / faster)
            return round(before * math.exp(-math.log(faster) * slope), 4)
        density, speedup = before, faster
    return 0.0
