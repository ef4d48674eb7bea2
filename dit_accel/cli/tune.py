"""`dit-accel tune`: find the settings of a model for a target, or calibrate the budgets of its heads."""

from __future__ import annotations

from typing import Any

import typer

from dit_accel.cli import BROKEN, Interrupted
from dit_accel.cli.eval import goes_on, show
from dit_accel.cli.options import command
from dit_accel.tune.request import TuneRequest


@command(TuneRequest)
def tune(arguments: dict[str, Any]) -> int:
    """Search for the best method and settings with short runs, or calibrate budgets, and write a settings file.

    With --cache every setting has that step cache. --cache mag without a target measures MagCache's ratios.

    `generate` and `eval` take the file with --load, `train` with --layer-schedule, `accelerate` with layer_schedule=.
    Run the same command again to resume a run that was stopped.

    Example: dit-accel tune --model demo --prompts prompts.txt --target 1.5x --output tuned
    """
    request = TuneRequest(**arguments)
    from dit_accel.tune import calibrate, job, ratios

    try:
        if request.calibrate is not None or request.measures_ratios:
            typer.echo("\n".join((ratios if request.measures_ratios else calibrate).run(request)))
            return 0
        summary, lines = job.run(request)
    except KeyboardInterrupt as stop:
        raise Interrupted(goes_on(request.output)) from stop
    show(summary)
    typer.echo("\n".join(lines), nl=bool(lines))
    return 0 if lines else BROKEN
