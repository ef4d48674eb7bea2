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
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, object]:
    """Platform, processor and GPUs (each with memory in bytes and compute capability)."""
    import os

    import torch

    from dit_accel.eval.provenance import processor

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
