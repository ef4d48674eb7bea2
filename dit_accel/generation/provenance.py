"""Versions, machine and commit of a run, for reports, rows and the JSON beside every output."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dit_accel import __version__

if TYPE_CHECKING:
    import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub"),
    *("torchmetrics", "imageio-ffmpeg", "numpy", "pillow"),
)


def versions() -> dict[str, str | None]:
    """The versions of this package, of Python and of each package in `PACKAGES`; None if not installed."""
    versions: dict[str, str | None] = {"dit_accel": __version__, "python": platform.python_version()}
    return versions | {package: version(package) for package in PACKAGES}


def version(package: str) -> str | None:
    """The version of a package; None if not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """Platform, processor and GPUs (each with memory in bytes and compute capability)."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory": properties.total_memory, "capability": capability})
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU what the machine says is available."""
    import psutil
    import torch

    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def processor() -> str:
    """The processor's name, from /proc/cpuinfo if there is one: `platform.processor` says less."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, Any]:
    """Fields of every row of results: GPU with architecture and driver (or None), processor, versions, commit, date."""
    import torch

    on_gpu = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "arch": f"sm_{major}{minor}" if on_gpu else None,
        "driver": driver(device) if on_gpu else None,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "triton": version("triton"),
        "git": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def driver(device: torch.device) -> str | None:
    """The version of NVIDIA's driver; None without nvidia-smi."""
    return _output("nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """The commit this package runs from, with ``-dirty`` behind it if files were changed; None outside a checkout."""
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != ROOT:  # an installed package may lie in another checkout
        return None
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    """The first line that a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
