"""`dit-accel generate`: a video or an image with accelerated attention, and beside it what that cost."""

from __future__ import annotations

from typing import Any

import typer

from dit_accel.cli import Interrupted
from dit_accel.cli.options import command
from dit_accel.errors import DitAccelError
from dit_accel.generation.request import GenerateRequest


@command(GenerateRequest)
def generate(arguments: dict[str, Any]) -> None:
    """Generate a video or an image with accelerated attention.

    Example: dit-accel generate --model demo --method radial --set decay=0.5 --compare --output circle.mp4
    """
    from dit_accel.cli import batch, job

    if {"prompt", "prompts"} <= arguments.keys():
        raise DitAccelError("--prompt and --prompts both give prompts. Leave one of them out.")
    request = GenerateRequest(**arguments)
    if request.prompts is not None:
        batch.run(request)
        return
    try:
        prepared = job.prepare(request)
        with job.reserved(prepared):
            for warning in filter(None, (prepared.unused, prepared.warning(request.prompt))):
                typer.echo(warning, err=True)
            lines = prepared.make(prepared.load(), request)
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted; nothing was written.") from stop
    typer.echo("\n".join(lines))
