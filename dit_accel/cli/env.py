"""`dit-accel env`: a report to paste into an issue."""

from __future__ import annotations

import json
from typing import Any

import typer

from dit_accel.cli.options import JsonOptions, command

# Beginnings of variables that change what runs; none is that of a secret such as HF_TOKEN.
SETTINGS = (
    *("TRITON_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_CUDA_"),
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
)


@command(JsonOptions)
def env(arguments: dict[str, Any]) -> None:
    """Print versions and machine, ready to paste into an issue."""
    import os

    from dit_accel.generation.provenance import machine, versions

    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}
    if JsonOptions(**arguments).json:
        report = {"versions": versions(), "machine": machine(), "environment": settings}
        typer.echo(json.dumps(report, indent=2))
        return
    lines = [f"- {name}: {version or 'not installed'}" for name, version in versions().items()]
    for name, value in machine().items():
        if isinstance(value, list):
            parts = ((gpu["name"], gpu["memory"] / 2**30, gpu["capability"].replace(".", "")) for gpu in value)
            value = ", ".join(f"{gpu} ({memory:.0f} GiB, sm_{arch})" for gpu, memory, arch in parts) or "none"
        lines.append(f"- {name}: {value}")
    lines += [f"- {name}={value}" for name, value in settings.items()]
    typer.echo("\n".join(lines))
