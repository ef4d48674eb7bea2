"""One timed call of a pipeline with a progress bar on its denoising loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError, first_line
from dit_accel.generation import modular
from dit_accel.generation.finite import find_place
from dit_accel.pipelines.quiet import quietly

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

FULL = "can't allocate memory"  # PyTorch's message on a CPU, where it has no error class for it
LARGEST_SEED = 2**64 - 1
ESTIMATED = 86_400.0  # seconds whose mean speed tells the time left
BAR_WIDTH, TIMES_WIDTH = 16, 36  # columns of the terminal for a progress bar, and for counts and times


@dataclasses.dataclass(frozen=True)
class TimedOutput:
    """The output of one call, its times and its memory.

    Args:
        frames: float32 [F, H, W, 3] in [0, 1]; an image has one frame.
        seconds: of the whole call, from prompt to pixels.
        denoising_seconds: of its denoising loop.
        peak_memory: largest number of bytes allocated on the GPU during the call; None on a CPU.
        sound: whether the pipeline also made sound, which is not kept.
    """

    frames: np.ndarray
    seconds: float
    denoising_seconds: float
    steps: int
    peak_memory: int | None
    sound: bool = False

    def record(self) -> dict[str, Any]:
        """The figures, without frames and sound."""
        names = ("seconds", "denoising_seconds", "steps", "peak_memory")
        per_step = self.denoising_seconds / max(self.steps, 1)
        return {name: getattr(self, name) for name in names} | {"seconds_per_step": per_step}


class Stopwatch:
    """Adds up the time of work on `device` between each `start` and `stop`, without making a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clocked = 0.0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin a time span."""
        self._began = self._mark()

    def stop(self) -> None:
        """Add the time since `start`."""
        ended = self._mark()
        if self._device.type == "cuda":
            self._events.append((self._began, ended))
        else:
            self._clocked += ended - self._began

    @property
    def seconds(self) -> float:
        """The sum; waits for the GPU."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._clocked + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Steps:
    """Replaces a pipeline's progress bar: shows the denoising loop in `progress` and times it."""

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
        """Count finished steps."""
        self.steps += count
        self.progress.update(self._task, advance=count)


def check_seeds(seeds: Collection[int]) -> None:
    """Refuse an empty list of seeds, and seeds that PyTorch's generator does not take."""
    odd = [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]
    if odd or not seeds:
        raise DitAccelError(f"A seed is a number from 0 to 2**64 - 1; got {odd[0] if odd else 'none'}.")


def call(pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int) -> Any:
    """The pipeline's output as arrays; the noise is drawn on the CPU, so every device has the same.

    Raises:
        DitAccelError: the pipeline's own check refuses the arguments, or memory runs out.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    # A modular pipeline logs the traceback of every error that it raises.
    quiet = quietly() if modular.is_modular(type(pipe)) else contextlib.nullcontext()
    try:
        with quiet:
            return pipe(**arguments, generator=generator, output_type="np")
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The blocks of a modular pipeline look at their arguments where they use them.
        if not any(
            frame.name == "check_inputs" or "modular_pipelines" in Path(frame.filename).parts for frame in frames
        ):
            raise
        raise DitAccelError(f"{type(pipe).__name__} rejects its arguments: {first_line(error)}") from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and FULL not in str(error):
            raise
        raise DitAccelError(
            f"{type(pipe).__name__} ran out of memory ({first_line(error)}). Ask for fewer frames or "
            "pixels, or give --vae-tiling, --offload model or --offload group, or --dtype bfloat16."
        ) from error


def hide_bars(pipe: Any) -> None:
    """Let the pipeline show no progress bars of its own."""
    for owner in _bar_owners(pipe):
        owner.set_progress_bar_config(disable=True)


def _bar_owners(pipe: Any) -> list[Any]:
    """What has the progress bars of a pipeline: itself, or the loops among its blocks."""
    return list(modular.loops(pipe._blocks)) if modular.is_modular(type(pipe)) else [pipe]


def sample(
    pipe: DiffusionPipeline,
    arguments: dict[str, Any],
    seed: int,
    title: str,
    device: torch.device,
    progress: Progress | None = None,
) -> TimedOutput:
    """Call the pipeline once on `device`, with `title` on a progress bar of its own, or in `progress` while it runs.

    Errors are those of `call`; frames with NaN or infinite values are refused, with their origin.
    """
    import numpy as np
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with _steps(pipe, title, device, progress) as steps:
        began = time.perf_counter()
        result = call(pipe, arguments, seed)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    name = next(name for name in ("frames", "videos", "images") if hasattr(result, name))
    frames = result.images[:1] if name == "images" else getattr(result, name)[0]
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    if not np.isfinite(frames).all():
        hide_bars(pipe)
        place = find_place(pipe, lambda **more: call(pipe, {**arguments, **more}, seed))
        raise DitAccelError(
            f"{type(pipe).__name__} produced NaN or infinite values, first in {place}. Lower --guidance, or try "
            "--dtype float32 or another method."
        )
    sound = any(getattr(result, name, None) is not None for name in ("audio", "sound"))
    return TimedOutput(frames, seconds, steps.watch.seconds, steps.steps, memory, sound)


def progress_bar(text: str = "{task.description}", *, show: bool = True) -> Progress:
    """A bar on stderr with counts and times, behind a text that rich formats; invisible unless `show`."""
    from rich import progress as rich
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    # In a narrow terminal the text is cut, and the times stay.
    text_column = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, console.width - BAR_WIDTH - TIMES_WIDTH))
    columns = (rich.TextColumn(text, table_column=text_column), rich.BarColumn(BAR_WIDTH), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    # Rich forgets what is older than half a minute, and one sample of a large model takes longer.
    return rich.Progress(*columns, *times, console=console, disable=not show, speed_estimate_period=ESTIMATED)


class TotalBar:
    """The bar of a whole piece of work, counted in denoising steps, under whose progress its parts show their own."""

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.progress, self._left = progress, steps
        self._task = progress.add_task(title, total=steps)

    def advance(self, steps: int) -> None:
        """Count finished steps."""
        self.progress.advance(self._task, steps)

    def spare(self, steps: int) -> None:
        """Take steps off the whole, such as those that an earlier run has done; negative ones are added."""
        self._left -= steps
        self.progress.update(self._task, total=self._left)


@contextlib.contextmanager
def _steps(pipe: DiffusionPipeline, title: str, device: torch.device, progress: Progress | None) -> Iterator[Steps]:
    with progress_bar() if progress is None else contextlib.nullcontext(progress) as bar:
        shown = list(bar.task_ids)
        steps = Steps(bar, title, device)
        owners = _bar_owners(pipe)
        for owner in owners:
            owner.progress_bar = steps
        try:
            yield steps
        finally:
            for owner in owners:
                del owner.progress_bar
            for task in set(bar.task_ids) - set(shown) if progress is not None else ():
                bar.remove_task(task)


@contextlib.contextmanager
def attention_time(pipe: Any, device: torch.device) -> Iterator[Stopwatch]:
    """Time a pipeline's self-attention modules (projections, attention and output) inside a with block.

    Where blocks permute tokens along a curve for their modules, that is not in it.
    The transformers must not be compiled: hooks inside a compiled block break its graph.
    """
    from dit_accel.pipelines.targets import find_transformers

    watch = Stopwatch(device)

    def start(*call: Any) -> None:
        watch.start()

    def stop(*call: Any) -> None:
        watch.stop()

    # where an accelerator permutes tokens, it looks for hooks that would see them permuted
    start.reads_tokens = stop.reads_tokens = False  # type: ignore[attr-defined]
    handles = []
    for transformer, family in find_transformers(pipe)[0].values():
        for _, module in family.attentions(transformer):
            handles.append(module.register_forward_pre_hook(start))
            handles.append(module.register_forward_hook(stop))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
