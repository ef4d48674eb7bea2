"""One model and its comparisons, dense and accelerated, one at a time; `page` shows them in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID

from dit_accel.cli import job
from dit_accel.errors import DitAccelError
from dit_accel.generation import output as media
from dit_accel.generation.request import GenerateRequest, ModelRequest
from dit_accel.plans import ramps

if TYPE_CHECKING:
    from dit_accel.generation.sampling import TimedOutput

NOT_HERE = ("layers", "budgets", "dense_backend")  # name files, or kernels that are fetched
Show = Callable[[str, int, int], None]  # takes a title, finished steps, and all steps


class Cancelled(Exception):
    """A comparison was stopped between two steps; the model is as before it."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The files and figures of one comparison.

    Args:
        dense, accelerated: videos (mp4) or images (png).
        captions: of both: what ran, and its seconds.
        likeness: speed-up, PSNR and SSIM in one line.
        mask: a picture of the block mask; None where none is known before the call.
        report: HTML, as a notebook shows it.
        remarks: such as why there is no mask, or words that the model does not know.
    """

    dense: Path
    accelerated: Path
    captions: tuple[str, str]
    likeness: str
    mask: Path | None
    report: str
    remarks: tuple[str, ...] = ()


class WatchedSteps(Progress):
    """Tells each step to `show`, prints nothing, and raises `Cancelled` at the first step after `stop` was set."""

    def __init__(self, show: Show, stop: threading.Event) -> None:
        super().__init__(disable=True)
        self._show, self._stop = show, stop

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        task = super().add_task(description, *args, **fields)
        self._tell(task)
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if self._stop.is_set():
            raise Cancelled
        (task,) = [task for task in self.tasks if task.id == task_id]
        self._show(task.description, int(task.completed), int(task.total or 0))


class Playground:
    """A loaded model. `compare` may be called from any thread, and one comparison runs at a time.

    Args:
        options: model, device and memory of every comparison.
        folder: for outputs; those of the comparison before are removed.

    Raises:
        DitAccelError: the model is refused or cannot be loaded.
    """

    def __init__(self, options: ModelRequest, folder: Path) -> None:
        self.options = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        self.folder = folder
        plain = job.prepare(GenerateRequest(**self.options))
        self.video = plain.fps is not None
        frames = {"frames": plain.arguments.get("num_frames")}
        self.sampling = frames | {name: plain.arguments[name] for name in ("height", "width")}
        self.sampling["steps"] = plain.arguments.get("num_inference_steps")  # None: the pipeline's own default
        self.pipe = plain.load()
        self._lock, self._tickets, self._counter = threading.Lock(), dict[str, threading.Event](), itertools.count()
        self._dense: tuple[str, TimedOutput] | None = None

    def ticket(self) -> str:
        """A name for one comparison, by which it can be cancelled while it waits or runs."""
        name = secrets.token_hex(16)
        self._tickets[name] = threading.Event()
        return name

    def cancel(self, ticket: str) -> bool:
        """Stop a comparison at its next step; False if it is over, or never was."""
        stop = self._tickets.get(ticket)
        if stop is not None:
            stop.set()
        return stop is not None

    def compare(self, ticket: str, values: dict[str, Any], show: Show) -> Comparison:
        """Generate densely and accelerated. An earlier dense output of the same call is used again.

        Args:
            ticket: from `ticket`, for this comparison alone.
            values: fields of `GenerateRequest` by name, of prompt, method and sampling; None where not given.
            show: is told the steps.

        Raises:
            Cancelled: `cancel` was called.
            DitAccelError: as in `job.prepare` and `sample`; there is no such ticket, or a setting names a file.
        """
        stop = self._tickets.get(ticket)
        if stop is None:
            raise DitAccelError("The comparison was not announced. Load the page again.")
        try:
            with self._lock:
                if stop.is_set():
                    raise Cancelled
                return self._compare(values, WatchedSteps(show, stop))
        finally:
            del self._tickets[ticket]

    def _compare(self, values: dict[str, Any], progress: WatchedSteps) -> Comparison:
        filled = {name: value for name, value in values.items() if value not in (None, "")}
        _refuse_files(filled.get("method"))
        number, ending = next(self._counter), ".mp4" if self.video else ".png"
        path = self.folder / f"{number:06d}{ending}"
        request = GenerateRequest(**self.options | filled, compare=True, output=path)
        prepared = job.prepare(request)
        key = repr((prepared.dense_arguments, request.prompt, request.seed))
        known = self._dense[1] if self._dense is not None and self._dense[0] == key else None
        runs, report = prepared.run(self.pipe, request, dense=known, progress=progress)
        self._dense = (key, runs["dense"])
        remarks = list(filter(None, (prepared.unused, prepared.warning(request.prompt))))
        if known is not None:
            remarks.append("The dense output is that of the comparison before.")
        if prepared.hint:
            remarks.append(prepared.hint)
        for old in self.folder.glob("*.*"):
            old.unlink()
        files = {}
        for name, output in runs.items():
            files[name] = path.with_name(media.sibling(path, name))
            pixels = (output.frames * 255).round().astype("uint8")
            media.write_frames(files[name], pixels, prepared.fps or 1)
        mask = None
        try:
            mask = self._draw(prepared, path.with_name(f"{path.stem}-mask.png"))
        except DitAccelError as error:
            remarks.append(f"No picture of the mask: {error}")
        titles = ("dense", prepared.candidate.title)
        captions = [f"{title}: {run.seconds:.2f} s" for title, run in zip(titles, runs.values(), strict=True)]
        likeness = job.likeness(job.compare(**runs))
        html, (dense, accelerated) = report._repr_html_(), captions
        return Comparison(
            files["dense"], files["accelerated"], (dense, accelerated), likeness, mask, html, tuple(remarks)
        )

    @staticmethod
    def _draw(prepared: job.GenerateJob, path: Path) -> Path:
        """The picture of `plan --image`, of a ramp in its first sparse step."""
        from dit_accel.plans.picture import block_picture

        setting = prepared.candidate.setting
        assert setting is not None
        if prepared.candidate.layered:
            raise DitAccelError("the layers have settings of their own.")
        media.check_matplotlib()
        plan = dataclasses.replace(setting, config=ramps.ends(setting.config)[0]).plan(prepared.grid)
        block_picture(plan).savefig(path)
        return path


def _refuse_files(method: str | None) -> None:
    """Refuse settings that would read a file of this machine, or fetch one."""
    named = re.search(rf"\b({'|'.join(NOT_HERE)})\s*=", method or "")
    if named:
        raise DitAccelError(f"The page takes no {named[1]}, which may read files. Use `dit-accel generate` for it.")
