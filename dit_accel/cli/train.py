"""`dit-accel train`: fine-tune a model with a sparse method at work, so that the quality comes back."""

from __future__ import annotations

from typing import Any

import typer

from dit_accel.cli import Interrupted
from dit_accel.cli.options import command
from dit_accel.train.request import DataSettings, RunOptions, TrainRequest
from dit_accel.train.settings import TrainSettings


@command(RunOptions, DataSettings, TrainSettings)
def train(run: dict[str, Any], data: dict[str, Any], settings: dict[str, Any]) -> None:
    """Fine-tune with sparse attention; in several processes with `accelerate launch -m dit_accel train ...`.

    Example: dit-accel train --recipe sla-demo --output trained
    """
    request = TrainRequest.of(run, data, settings)
    from dit_accel.train import job

    try:
        typer.echo("\n".join(job.run(request)))
    except KeyboardInterrupt as stop:
        from dit_accel.train.state import checkpoints_in

        checkpoints = checkpoints_in(request.run.output / "checkpoints")
        then = f"to continue from {checkpoints[-1]}" if checkpoints else "to start again; there is no checkpoint yet"
        raise Interrupted(f"interrupted. Run the same command {then}.") from stop
