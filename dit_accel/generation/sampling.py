"""One timed call of a pipeline with a progress bar on its denoising loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError, first_line
from dit_accel.generation.finite import find_place
from dit_accel.generation.stopwatch import Stopwatch

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

FULL = "can't allocate memory"  # PyTorch's message on a CPU, where it has no error class for it
LARGEST_SEED = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class TimedOutput:
    """The output of one call, its times and its memory.

    Args:
        frames: float32 [F, H, W, 3] in [0, 1]; an image has one frame.
        seconds: of the whole call, from prompt to pixels.
        denoising_seconds: of its denoising loop.
        steps: number of denoising steps.
        peak_memory: largest number of bytes allocated on the GPU during the call; None on a CPU.
    """

    frames: np.ndarray
    seconds: float
    denoising_seconds: float
    steps: int
    peak_memory: int | None

    def record(self) -> dict[str, Any]:
        """The figures, without the frames."""
        figures = dataclasses.asdict(dataclasses.replace(self, frames=None))  # type: ignore[arg-type]
        del figures["frames"]
        return figures | {"seconds_per_step": self.denoising_seconds / max(self.steps, 1)}


class Steps:
    """Replaces a pipeline's progress bar: shows the denoising loop and times it.

    Args:
        progress: where to show it.
        title: of the run.
        device: where the work runs.
    """

    def __init__(self, progress: Progress, title: str, device: torch.device) -> None:
        self.progress, self.title = progress, title
        self.watch, self.steps = Stopwatch(device), 0

    def __call__(self, iterable: Iterable | None = None, total: int | None = None) -> Steps:
        self._items = iterable
        self._total = total if iterable is None else len(iterable)  # type: ignore[arg-type]
        return self

    def __enter__(self) -> Steps:
        self._task = self.progress.add_task(self.title, total=self._total)
        self.watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.stop()

    def __iter__(self) -> Iterator:
        assert self._items is not None
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """A step is done."""
        self.steps += count
        self.progress.update(self._task, advance=count)


def check_seeds(seeds: Collection[int]) -> None:
    """See before the work that PyTorch's generator takes these seeds.

    Raises:
        DitAccelError: there are none, or one is below 0 or above 2**64 - 1.
    """
    odd = [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]
    if odd or not seeds:
        raise DitAccelError(f"A seed is a number from 0 to 2**64 - 1; got {odd[0] if odd else 'none'}.")


def call(pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int) -> Any:
    """The pipeline's output as numbers; the noise is drawn on the CPU, so that it is the same on every device.

    Raises:
        DitAccelError: the pipeline's own check refuses the arguments, or memory runs out.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        return pipe(**arguments, generator=generator, output_type="np")
    except ValueError as error:
        if all(frame.name != "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise DitAccelError(f"{type(pipe).__name__} refuses what it was given: {first_line(error)}") from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and FULL not in str(error):
            raise
        raise DitAccelError(
            f"{type(pipe).__name__} ran out of memory ({first_line(error)}): ask for fewer frames or "
            "pixels, or give --vae-tiling, --offload model or --offload group, or --dtype bfloat16."
        ) from error


def sample(
    pipe: DiffusionPipeline, arguments: dict[str, Any], seed: int, title: str, device: torch.device
) -> TimedOutput:
    """Call the pipeline once.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        seed: of the noise.
        title: for the progress bar.
        device: where the work runs.

    Raises:
        DitAccelError: as `call`, or the frames have values that are NaN or infinite; the message says where from.
    """
    import numpy as np
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with _steps(pipe, title, device) as steps:
        began = time.perf_counter()
        result = call(pipe, arguments, seed)
        synchronize(device)
        seconds = time.perf_counter() - began
    frames = result.frames[0] if hasattr(result, "frames") else result.images[:1]
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    if not np.isfinite(frames).all():
        place = find_place(pipe, lambda **more: call(pipe, {**arguments, **more}, seed))
        raise DitAccelError(
            f"{type(pipe).__name__} made values that are NaN or infinite, first in {place}: lower --guidance, or try "
            "--dtype float32 or another method."
        )
    return TimedOutput(frames, seconds, steps.watch.seconds, steps.steps, memory)


def progress_bar(text: str = "{task.description}", *, show: bool = True) -> Progress:
    """A bar on stderr with a text, counts and times.

    Args:
        text: in front of the bar, as rich formats it.
        show: whether this process shows it.
    """
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn(text), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    return rich.Progress(*columns, rich.TimeRemainingColumn(), console=Console(stderr=True), disable=not show)


@contextlib.contextmanager
def _steps(pipe: DiffusionPipeline, title: str, device: torch.device) -> Iterator[Steps]:
    with progress_bar() as progress:
        steps = Steps(progress, title, device)
        pipe.progress_bar = steps
        try:
            yield steps
        finally:
            del pipe.progress_bar


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
