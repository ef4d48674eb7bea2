"""What ran: the versions and the machine, for reports and for the JSON beside every output."""

from __future__ import annotations

import importlib.metadata
import platform

from dit_accel import __version__

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "torchmetrics",
    "imageio-ffmpeg",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str | None]:
    """The version of this package, of Python and of each package that matters; None where one is not installed."""
    found: dict[str, str | None] = {"dit_accel": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = version(package)
    return found


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """Platform, processor and GPUs (each with memory in bytes and compute capability)."""
    import os

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


def processor() -> str:
    """The processor's name; /proc/cpuinfo says more than `platform.processor`, where there is one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
