"""Quality versus speed of a model's methods: checked, generated, scored, written.

Everything that can be refused is refused before the first weight of the model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.eval import gates
from dit_accel.eval.attention import parse_choice
from dit_accel.eval.metric import ChosenMetric, choose
from dit_accel.eval.processes import Processes
from dit_accel.eval.samples import Results, Store
from dit_accel.eval.summary import FIGURES, Evaluation, Summary, limited, write
from dit_accel.eval.sweep import Entry, Item, Sweep, entries, folder_hash
from dit_accel.files import check_folder, hold
from dit_accel.generation import call, captioned, prompts, sources
from dit_accel.generation.choice import Choice
from dit_accel.generation.request import ModelRequest
from dit_accel.generation.sampling import check_seeds
from dit_accel.generation.sizes import sizes_of
from dit_accel.generation.versions import machine, versions

if TYPE_CHECKING:
    import torch

    from dit_accel.generation.captioned import Captioned
    from dit_accel.generation.sources import Source

BROKEN = 1  # the exit status where a limit does not hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(ModelRequest):
    """What `dit-accel eval` was asked for; each field is the option of that name."""

    output: Path
    prompts: str | None = None
    seeds: tuple[int, ...] = (0,)
    methods: tuple[Choice, ...] = ()
    metrics: tuple[str, ...] = ()
    real: Path | None = None
    require: str | None = None
    attention_report: str | None = None
    pictures: int = 4
    cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an evaluation.

    Args:
        summary: as in summary.json; None on all processes but the first.
        broken: the limits that do not hold, a line each.
    """

    summary: Summary | None
    broken: list[str]

    @property
    def status(self) -> int:
        """The exit status: 0, or 1 where a limit does not hold."""
        return BROKEN if self.broken else 0


def run(request: Request) -> Outcome:
    """Evaluate.

    Raises:
        DitAccelError: something asked for cannot be done. What was finished before stays, and is not done again.
    """
    listed = _entries(request)
    maps = None if request.attention_report is None else parse_choice(request.attention_report)
    limits = [] if request.require is None else gates.parse(request.require)
    source = sources.find(request.model, request.revision)
    check_seeds(request.seeds)
    asked = prompts.read(request.prompts or ("demo" if source.kind == "embedded" else "general"))
    items = [Item(text, seed) for text in dict.fromkeys(asked.texts) for seed in request.seeds]
    sizes = sizes_of(source)
    shape = sizes.chosen(request.frames, request.height, request.width)
    grid = sizes.grid(*shape)
    for entry in listed:
        if entry.choice is not None:
            entry.choice.check(grid)
    check_folder(request.output)
    if request.cache is not None:
        check_folder(request.cache, "--cache")
    processes = Processes.join(request.device)
    device, dtype = call.placement(processes.device(request.device), request.dtype, request.offload)
    media = asked.media if request.real is None else _real_set(request.real)
    images = _count_images(media)
    metrics = choose(request.metrics, source.kind == "embedded", shape[0], device)
    gates.check_names(limits, (*FIGURES, *(metric.name for metric in metrics)))
    _check_sets(metrics, images if media else None, shape[0] * len(items), device)

    with hold(request.output) if processes.main else contextlib.nullcontext() as kept:
        if kept is False:
            print(f"{request.output} has no locks; start no other evaluation into it.", file=sys.stderr)
        pipe = request.load_pipe(source, dtype, device)
        pipe.set_progress_bar_config(disable=True)

        def arguments(own: Mapping[str, Any]) -> dict[str, Any]:
            defaults = sources.call_defaults(source) | dict(own)
            made = request.arguments(pipe, defaults, shape, video=sizes.video, prompt="")
            return {name: value for name, value in made.items() if name != "prompt"}

        fps = request.rate(pipe, source, arguments({}))
        results = Results(request.output, processes.index)
        results.read()
        for place in results.damaged if processes.main else ():
            print(f"{place}, is damaged; its sample is made again.", file=sys.stderr)
        processes.wait()
        sweep = Sweep(
            pipe,
            arguments,
            _identity(source, device, dtype, request),
            device,
            results,
            Store(request.output / "samples"),
            Store(request.cache or request.output / "references"),
            compile=request.compile,
        )
        attention = []
        if maps is not None and processes.main:
            attention = [sweep.attention(entry, items[0], maps, request.output / "attention") for entry in listed[1:]]
        sweep.run(listed, processes.share(items))
        processes.wait()
        results.read()
        evaluation = Evaluation(
            request=request,
            entries=listed,
            items=items,
            sweep=sweep,
            metrics=metrics,
            media=media,
            images=images,
            attention=attention,
            grid=grid,
            fps=fps,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            processes=processes,
        )
        summary = write(evaluation)
        return Outcome(summary, [] if summary is None else gates.broken(limits, limited(summary)))


def _entries(request: Request) -> list[Entry]:
    listed = entries(request.methods)
    labels = [entry.label for entry in listed]
    if len(listed) == 1:
        raise DitAccelError("Nothing to evaluate: give --method METHOD[:KEY=VALUE,...], repeatable, or --suite FILE.")
    for label in labels:
        if labels.count(label) > 1:
            raise DitAccelError(f"{label} is listed twice; leave one out.")
    return listed


def _real_set(folder: Path) -> tuple[Captioned, ...]:
    if not folder.is_dir():
        raise DitAccelError(f"--real {folder} is no folder; give one of images or videos.")
    return tuple(captioned.find(folder))


def _count_images(media: tuple[Captioned, ...]) -> int:
    """Frames of a set of real media, all of it read once, so that a damaged file shows now and not after the work.

    Raises:
        DitAccelError: a file cannot be read, or they are not of one size.
    """
    count, first = 0, None
    for found in media:
        frames = captioned.read_frames(found.path)
        count += len(frames)
        size = frames.shape[1:3]
        first = first or (found.path, size)
        if size != first[1]:
            (one, other) = (f"{path.name} is {h}x{w}" for path, (h, w) in (first, (found.path, size)))
            raise DitAccelError(f"The files of --real have one size, and {one}, {other}; bring them to the same.")
    return count


def _check_sets(metrics: list[ChosenMetric], reference: int | None, generated: int, device: torch.device) -> None:
    """Refuse what was asked for by name and would have no figure."""
    from dit_accel.eval.scoring import features_of

    for metric in metrics:
        if metric.declared.collect is None or not metric.asked:
            continue
        least = metric.declared.least(features_of(metric, device))
        for whose, count in (("the set of --real has", reference), ("this run generates", generated)):
            if count is not None and count < least:
                raise DitAccelError(
                    f"{metric.name} needs {least:,} images in each set, and {whose} {count:,}; add some, or leave it."
                )


def _identity(source: Source, device: torch.device, dtype: torch.dtype, request: Request) -> dict[str, Any]:
    """What decides the pixels beside the call: the model, where it runs, in what, with which versions."""
    return {
        # A snapshot of the Hub lies in a folder named after its commit, which also decides its weights.
        "model": source.folder.name if source.kind == "hub" else folder_hash(source.folder),
        "device": machine()["gpus"] if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "options": [request.vae_tiling, request.compile],
        "versions": {name: versions()[name] for name in ("torch", "diffusers", "transformers", "triton")},
    }
