"""Figures that others published, which a suite shows beside those measured here."""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_accel import values
from dit_accel.errors import DitAccelError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(values.Checked):
    """What a publication says of one method.

    Args:
        name: the publication's name of the method.
        where: hardware, and model and size where they are not the suite's.
        source: paper or repository.
        speedup: time of the whole dense call over the method's.
        density: share of pairs or blocks that are attended.
        psnr, ssim, lpips: against dense outputs of the same prompt and seed.
        vbench, geneval: totals of these benchmarks.
        note: what else has to be known.
        label: of the row here that runs the method; empty: none does.
    """

    name: str
    where: str
    source: str
    speedup: float | None = None
    density: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    vbench: float | None = None
    geneval: float | None = None
    note: str = ""
    label: str = ""

    @classmethod
    def build(cls, entry: Any, label: str) -> Published:
        """One from its mapping in a suite; what is missing or unknown is refused."""
        if not isinstance(entry, dict) or not {"name", "where", "source"} <= set(entry):
            raise DitAccelError(f"Published figures are a mapping with name, where and source; got {entry!r}.")
        return values.build(cls, entry | {"label": label}, "Published figures")
