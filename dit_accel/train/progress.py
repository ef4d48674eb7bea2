"""The progress bar of a training run: steps, loss and rate."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar on stderr, for the process that shows it.

    Args:
        total: optimizer steps of the run.
        done: steps that a checkpoint brought.
        show: whether this process shows anything.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        figures = TextColumn("loss {task.fields[loss]} · {task.fields[pace]} steps/s")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), figures)
        self._bar = Bar(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not show
        )
        self._task = self._bar.add_task("training", total=total, completed=done, loss="-", pace="-")

    def advance(self, loss: float, pace: float) -> None:
        """A step is done."""
        self._bar.update(self._task, advance=1, loss=f"{loss:.4g}", pace=f"{pace:.2f}")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()
