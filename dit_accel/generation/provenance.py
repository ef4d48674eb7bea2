"""With what and on what a result was made: the fields that every row has."""

from __future__ import annotations

import pathlib
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dit_accel.generation.versions import processor, version

if TYPE_CHECKING:
    import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


def provenance(device: torch.device) -> dict[str, Any]:
    """GPU and its architecture (None where none was used), driver, processor, threads, versions, commit and date."""
    import torch

    from dit_accel.hooks.break_even import architecture

    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "arch": architecture(device),
        "driver": driver(device) if on_gpu else None,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "triton": version("triton"),
        "git": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def driver(device: torch.device) -> str | None:
    """Version of NVIDIA's driver; None where its tool is not installed."""
    return _output("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """The commit this package runs from, with ``-dirty`` behind it if files were changed; None outside a checkout."""
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != ROOT:  # an installed package may lie in a checkout of another
        return None
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    """The first line a program prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
