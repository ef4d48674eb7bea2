"""What a finished evaluation says: rows with figures, pictures to look at, and how all of it was made."""

from __future__ import annotations

import dataclasses
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.metric import ChosenMetric
from dit_accel.eval.processes import Processes
from dit_accel.eval.report import write_report
from dit_accel.eval.samples import Row
from dit_accel.eval.scoring import Figure, plain, score
from dit_accel.eval.sweep import Entry, Item, Sweep
from dit_accel.files import staged
from dit_accel.generation.output import write_frames
from dit_accel.generation.provenance import commit
from dit_accel.generation.versions import machine, versions

if TYPE_CHECKING:
    import torch

    from dit_accel.eval.quality import Request
    from dit_accel.generation.captioned import Captioned
    from dit_accel.tokens import TokenGrid

Summary = dict[str, Any]

# Figures beside the metrics, by which a method can be held to a limit.
FIGURES = ("speedup", "attention_speedup", "density", "loop_seconds", "attention_seconds", "peak_bytes")
DENSE_OUTPUTS = "the dense outputs"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A sweep whose samples are all there.

    Args:
        request: what was asked for.
        entries: the reference and the methods.
        items: prompts and seeds.
        sweep: knows where the samples lie.
        metrics: to score.
        media, images: the reference set and how many images it has; none: the reference's own frames.
        attention: what `Sweep.attention` gave for each method; empty where it was not asked for.
        grid: of the tokens.
        fps: of the videos.
        device, dtype: where and in what the model ran.
        processes: who shares the work.
    """

    request: Request
    entries: Sequence[Entry]
    items: Sequence[Item]
    sweep: Sweep
    metrics: Sequence[ChosenMetric]
    media: Sequence[Captioned]
    images: int
    attention: Sequence[dict[str, Any]]
    grid: TokenGrid
    fps: int
    device: torch.device
    dtype: str
    processes: Processes

    def rows(self, entry: Entry) -> list[Row]:
        """The rows of a method's samples, in the order of the items."""
        return [self.sweep.results.rows[self.sweep.key(entry, item)] for item in self.items]

    def frames(self, label: str, item: Item) -> Any:
        """Of a sample: uint8 [F, H, W, 3]."""
        entry = next(entry for entry in self.entries if entry.label == label)
        return self.sweep.store(entry).frames(self.sweep.key(entry, item))


def write(done: Evaluation) -> Summary | None:
    """Score all samples; on the first process write results, pictures and the report.

    Returns:
        What summary.json holds; None on the other processes.

    Raises:
        DitAccelError: something cannot be written.
    """
    readers = [(item.prompt, lambda label, item=item: done.frames(label, item)) for item in done.items]
    labels = [entry.label for entry in done.entries]
    scored = score(done.metrics, labels, readers, done.media, done.processes, done.device)
    if not done.processes.main:
        return None
    rows = {entry.label: _with_scores(done.rows(entry), scored[entry.label][0]) for entry in done.entries}
    done.sweep.results.rewrite(own[index] for index in range(len(done.items)) for own in rows.values())
    reference = rows[labels[0]]
    summary = {
        "title": f"{done.request.model}: quality and speed of {len(labels) - 1} settings",
        "made": _made(done),
        "metrics": [metric.about() for metric in done.metrics],
        "rows": [
            _row(entry, rows[entry.label], reference, scored[entry.label][1])
            | {"guidance": done.sweep.arguments(entry).get("guidance_scale")}
            for entry in done.entries
        ],
        "samples": _write_media(done, rows),
        "masks": _write_masks(done),
        "attention": list(done.attention),
    }
    write_report(summary, done.request.output)
    return summary


def limited(summary: Summary) -> dict[str, dict[str, float | None]]:
    """The figures of every method but the reference, for limits: by label and name, None where there is none."""
    found = {}
    for row in summary["rows"]:
        if row["reference"]:
            continue
        figures = {name: figure["value"] for name, figure in row["figures"].items()}
        figures |= {name: row[name] for name in ("speedup", "attention_speedup", "density", "peak_bytes")}
        for name in ("loop_seconds", "attention_seconds"):
            figures[name] = None if row[name] is None else row[name]["p50"]
        found[row["label"]] = {name: None if value is None else float(value) for name, value in figures.items()}
    return found


def _with_scores(rows: Sequence[Row], values: Mapping[str, Sequence[float]]) -> list[Row]:
    return [
        row | {"scores": {name: plain(own[index]) for name, own in values.items()}} for index, row in enumerate(rows)
    ]


def _row(entry: Entry, rows: Sequence[Row], reference: Sequence[Row], figures: Mapping[str, Figure]) -> dict[str, Any]:
    """One method's line of the table."""
    loop, dense_loop = (_quantiles(own, "denoising_seconds") for own in (rows, reference))
    attention, dense_attention = (_quantiles(own, "attention_seconds") for own in (rows, reference))
    assert loop is not None and dense_loop is not None
    peaks = [row["peak_memory"] for row in rows if row["peak_memory"] is not None]
    return {
        "label": entry.label,
        "reference": entry.choice is None,
        **entry.record(),
        "samples": len(rows),
        "steps": rows[0]["steps"],
        "density": statistics.fmean(row["density"] for row in rows),
        "speedup": dense_loop["p50"] / loop["p50"],
        "attention_speedup": dense_attention["p50"] / attention["p50"] if attention and dense_attention else None,
        "loop_seconds": loop,
        "attention_seconds": attention,
        "peak_bytes": max(peaks, default=None),
        "cached": sum(row["cached"] for row in rows),
        "kernels": sorted({kernel for row in rows for kernel in row.get("kernels", ())}),
        "figures": {
            name: figure if figure["value"] is None else figure | {"value": plain(figure["value"])}
            for name, figure in figures.items()
        },
    }


def _quantiles(rows: Sequence[Row], name: str) -> dict[str, float] | None:
    """50th and 95th percentile of a time; None where it was not taken."""
    times = [row[name] for row in rows]
    if None in times:
        return None
    if len(times) == 1:
        return {"p50": times[0], "p95": times[0]}
    twentieths = statistics.quantiles(times, n=20, method="inclusive")
    return {"p50": twentieths[9], "p95": twentieths[18]}


def _made(done: Evaluation) -> dict[str, Any]:
    """How every figure was made."""
    request, arguments = done.request, done.sweep.arguments(done.entries[0])
    frames = f"{arguments['num_frames']} frames of " if "num_frames" in arguments else ""
    return {
        "command": shlex.join(["dit-accel", *sys.argv[1:]]),
        "model": request.model,
        "revision": request.revision,
        "pipeline": type(done.sweep.pipe).__name__,
        "scheduler": type(done.sweep.pipe.scheduler).__name__,
        "size": f"{frames}{arguments['height']}x{arguments['width']} pixels",
        "grid": str(done.grid),
        "tokens": done.grid.tokens,
        "steps": done.sweep.results.rows[done.sweep.key(done.entries[0], done.items[0])]["steps"],
        "guidance": arguments.get("guidance_scale"),
        "seeds": list(request.seeds),
        "prompts": list(dict.fromkeys(item.prompt for item in done.items)),
        "reference": f"{DENSE_OUTPUTS} of the same prompt and seed",
        "distribution": _distribution(done),
        "times": (
            "Of the denoising loop, and in it of the self-attention modules with their projections; after a warm-up of "
            "each method, methods in turn within a prompt; speed-ups are ratios of medians."
        ),
        "compiled": request.compile,
        "processes": done.processes.count,
        "dtype": done.dtype,
        "device": str(done.device),
        "hardware": _hardware(done.device),
        "versions": versions(),
        "git": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _distribution(done: Evaluation) -> str:
    if not done.media:
        return DENSE_OUTPUTS
    return f"{done.media[0].path.parent}, {done.images} images"


def _hardware(device: torch.device) -> str:
    found = machine()
    if device.type == "cuda":
        gpus: Any = found["gpus"]
        return str(gpus[device.index or 0]["name"])
    return f"{found['processor']}, {found['cores']} cores, {found['torch_threads']} threads"


def _write_media(done: Evaluation, rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The first samples of every method as files, and what is to be said of each."""
    shown = list(enumerate(done.items[: done.request.pictures]))
    folder, listed = done.request.output / "media", []
    if not shown:
        return []
    with staged(folder / "all") as stage:
        for index, item in shown:
            for entry in done.entries:
                frames = done.frames(entry.label, item)
                name = f"{index + 1:03d}-{slug(entry.label)}{'.png' if len(frames) == 1 else '.mp4'}"
                write_frames(stage / name, frames, done.fps)
                row = rows[entry.label][index]
                listed.append(
                    {
                        "row": entry.label,
                        "prompt": item.prompt,
                        "seed": item.seed,
                        "media": f"media/{name}",
                        "figures": row["scores"],
                    }
                )
    return listed


def _write_masks(done: Evaluation) -> list[dict[str, str]]:
    """Pictures of the masks that are known before the call."""
    from dit_accel import registry

    listed = []
    with staged(done.request.output / "masks" / "all") as stage:
        for entry in done.entries:
            choice = entry.choice
            if choice is None or choice.name == "dense" or choice.layers is not None:
                continue
            plan = registry.plan(choice.name, done.grid, **choice.config)
            try:
                picture = plan.image()
            except DitAccelError:  # a method that routes by content has no mask that is known before the call
                continue
            name = f"{slug(entry.label)}.png"
            picture.save(stage / name)
            listed.append({"row": entry.label, "image": f"masks/{name}"})
    return listed


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.=]+", "-", label)
