"""The summary of an evaluation: rows with figures, the verdict, samples to look at, and how all of it was made."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dit_accel.eval import layout, verdict
from dit_accel.eval.gates import Limit
from dit_accel.eval.layout import slug
from dit_accel.eval.metric import ChosenMetric
from dit_accel.eval.report import write_report
from dit_accel.eval.request import EvalRequest
from dit_accel.eval.samples import Row
from dit_accel.eval.scoring import Figure, bootstrap, plain, score
from dit_accel.eval.sweep import PromptSeed, Sweep
from dit_accel.files import MARK, staged
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.captioned import Captioned
from dit_accel.generation.output import write_frames, write_png
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.provenance import commit, machine, versions
from dit_accel.generation.request import ModelRequest
from dit_accel.registry import value_text
from dit_accel.tokens import TokenGrid

Summary = dict[str, Any]

DENSE_OUTPUTS = "the dense outputs"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Args:
        candidates: the baseline and the methods.
        left_out: why metrics are left out that are usually measured.
        media, images: the real set and how many images it has; none: the baseline's own frames.
    """

    request: EvalRequest
    limits: Sequence[Limit]
    candidates: Sequence[Candidate]
    items: Sequence[PromptSeed]
    sweep: Sweep
    metrics: Sequence[ChosenMetric]
    left_out: Sequence[str]
    media: Sequence[Captioned]
    images: int
    grid: TokenGrid
    fps: int
    process: ProcessRank

    def origin(self) -> dict[str, Any]:
        """Model, grid and prompts, for the file of a search or a calibration."""
        prompts = [item.prompt for item in self.items]
        return {"model": self.request.model, "grid": str(self.grid), "prompts": prompts}

    def frames(self, label: str, item: PromptSeed) -> np.ndarray:
        """Of a sample: uint8 [F, H, W, 3]."""
        candidate = next(candidate for candidate in self.candidates if candidate.label == label)
        return self.sweep.store(candidate).frames(self.sweep.key(candidate, item))


def write(done: Evaluation, attention: Sequence[dict[str, Any]]) -> Summary | None:
    """Score all samples; on the first process write results, pictures and the report.

    What summary.json holds, with the map of each method's `attention`; None on the other processes.
    """
    readers = [(item.prompt, lambda label, item=item: done.frames(label, item)) for item in done.items]
    labels = [candidate.label for candidate in done.candidates]
    scored = score(done.metrics, labels, readers, done.media, done.process, done.sweep.device)
    if not done.process.main:
        return None
    rows = {candidate.label: _with_scores(done, candidate, scored[candidate.label][0]) for candidate in done.candidates}
    done.sweep.results.rewrite(scored_rows[index] for index in range(len(done.items)) for scored_rows in rows.values())
    listed = [_row(done, candidate, rows, scored[candidate.label][1]) for candidate in done.candidates]
    metrics = [metric.about() for metric in done.metrics]
    summary = {
        "note": MARK,
        "title": f"{done.request.model}: quality and speed of {len(labels) - 1} settings",
        "made": _origin(done),
        "metrics": metrics,
        "rows": listed,
        "verdict": verdict.decide(listed, metrics, done.limits, done.grid.tokens),
        "samples": _write_media(done, rows),
        "masks": _write_masks(done),
        "published": [dataclasses.asdict(entry) for entry in done.request.published],
        "attention": list(attention),
    }
    write_report(summary, done.request.output)
    if done.request.layout is not None:
        layout.write(done.request.output / layout.FOLDER, labels, done.items, done.frames, done.fps)
    return summary


def _with_scores(done: Evaluation, candidate: Candidate, values: Mapping[str, Sequence[float]]) -> list[Row]:
    """The rows of a method's samples, in the order of the items, with the values of its metrics."""
    known, keys = done.sweep.results.rows, [done.sweep.key(candidate, item) for item in done.items]
    scores = ({name: plain(numbers[index]) for name, numbers in values.items()} for index in range(len(keys)))
    return [known[key] | {"scores": sample} for key, sample in zip(keys, scores, strict=True)]


def _row(
    done: Evaluation, candidate: Candidate, rows: Mapping[str, Sequence[Row]], figures: Mapping[str, Figure]
) -> dict[str, Any]:
    """One method's line of the table."""
    sparse, base = rows[candidate.label], rows[done.candidates[0].label]
    loop, dense_loop = (_quantiles(samples, "denoising_seconds") for samples in (sparse, base))
    attention, dense_attention = (_quantiles(samples, "attention_seconds") for samples in (sparse, base))
    assert loop is not None and dense_loop is not None
    peaks = [row["peak_memory"] for row in sparse if row["peak_memory"] is not None]
    prompts = len({item.prompt for item in done.items})
    times = ([row["denoising_seconds"] for row in samples] for samples in (base, sparse))
    return {
        "label": candidate.label,
        **candidate.record(),
        "command": shlex.join(_command(done, candidate)),
        "samples": len(sparse),
        "steps": sparse[0]["steps"],
        "guidance": done.sweep.arguments(candidate).get("guidance_scale"),
        "density": statistics.fmean(row["density"] for row in sparse),
        "speedup": dense_loop["p50"] / loop["p50"],
        "speedup_interval": bootstrap(_ratio_of_medians, prompts, *times),
        "attention_speedup": dense_attention["p50"] / attention["p50"] if attention and dense_attention else None,
        "loop_seconds": loop,
        "attention_seconds": attention,
        "peak_bytes": max(peaks, default=None),
        "cached": sum(row["cached"] for row in sparse),
        "kernels": sorted({kernel for row in sparse for kernel in row.get("kernels", ())}),
        "figures": plain(figures),
    }


def _ratio_of_medians(base: np.ndarray, method: np.ndarray) -> np.ndarray:
    medians = (np.median(times.reshape(len(times), -1), axis=1) for times in (base, method))
    return next(medians) / next(medians)


def _command(done: Evaluation, candidate: Candidate) -> list[str]:
    """The command that generates the first sample of a method."""
    request, setting, item = done.request, candidate.setting, done.items[0]
    options: dict[str, Any] = {"model": request.model, "prompt": item.prompt, "seed": item.seed}
    options |= model_options(request)
    if candidate.folder is not None:
        options["load"] = candidate.published or candidate.folder
        options |= {"set": tuple(f"{key}={value_text(value)}" for key, value in candidate.overrides.items())}
        options |= candidate.words
        options |= {name: True for name in ("any_weights", "keep_int8") if getattr(candidate, name)}
    elif setting is not None:
        options |= {"method": setting.title} | setting.words()
    return [*generating(options), "--output", "out.mp4" if done.grid.frames > 1 else "out.png"]


def model_options(request: ModelRequest) -> dict[str, Any]:
    """Model, size and call as options, those alone that differ from their defaults."""
    usual = {field.name: field.default for field in dataclasses.fields(ModelRequest)}
    return {name: getattr(request, name) for name in usual if getattr(request, name) != usual[name]}


def generating(options: Mapping[str, Any]) -> list[str]:
    """The words of a command that generates with these options, by field."""
    command = ["dit-accel", "generate"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("pipe", "set"):
            command += [part for item in value for part in (option, item)]
        else:
            command += [option] if value is True else [option, str(value)]
    return command


def _quantiles(rows: Sequence[Row], name: str) -> dict[str, float] | None:
    """50th and 95th percentile of a time; None where it was not taken."""
    times = [row[name] for row in rows]
    if None in times:
        return None
    median, late = np.quantile(times, (0.5, 0.95)).tolist()
    return {"p50": median, "p95": late}


def _origin(done: Evaluation) -> dict[str, Any]:
    """How every figure was made."""
    request, arguments = done.request, done.sweep.arguments(done.candidates[0])
    frames = f"{arguments['num_frames']} frames of " if "num_frames" in arguments else ""
    computer: Any = machine()
    hardware = f"{computer['processor']}, {computer['cores']} cores, {computer['torch_threads']} threads"
    if done.sweep.device.type == "cuda":
        hardware = computer["gpus"][done.sweep.device.index or 0]["name"]
    return {
        "command": shlex.join(["dit-accel", *sys.argv[1:]]),
        "model": request.model,
        "revision": request.revision,
        "pipeline": type(done.sweep.pipe).__name__,
        "scheduler": type(done.sweep.pipe.scheduler).__name__,
        "size": f"{frames}{arguments['height']}x{arguments['width']} pixels",
        "grid": str(done.grid),
        "tokens": done.grid.tokens,
        "steps": done.sweep.results.rows[done.sweep.key(done.candidates[0], done.items[0])]["steps"],
        "guidance": arguments.get("guidance_scale"),
        "seeds": list(request.seeds),
        "prompts": list(dict.fromkeys(item.prompt for item in done.items)),
        "baseline": f"{DENSE_OUTPUTS} of the same prompt and seed",
        "real_set": f"{done.media[0].path.parent}, {done.images} images" if done.media else DENSE_OUTPUTS,
        "left_out": list(done.left_out),
        "times": (
            "Of the denoising loop, and in it of the self-attention modules with their projections. Each method is "
            "warmed up, and methods take turns within a prompt. Speed-ups are ratios of medians."
        ),
        "compiled": request.compile,
        "processes": done.process.count,
        "dtype": done.sweep.identity["dtype"].removeprefix("torch."),
        "device": str(done.sweep.device),
        "hardware": hardware,
        "versions": versions(),
        "git": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_media(done: Evaluation, rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The first samples of every method as files, and their entries in the summary."""
    listed: list[dict[str, Any]] = []
    if not done.request.pictures:
        return listed
    with staged(done.request.output / "media" / "all") as stage:
        for index, item in enumerate(done.items[: done.request.pictures]):
            for label, samples in rows.items():
                frames = done.frames(label, item)
                name = f"{index + 1:03d}-{slug(label)}{'.png' if len(frames) == 1 else '.mp4'}"
                write_frames(stage / name, frames, done.fps)
                shows = {"row": label, "prompt": item.prompt, "seed": item.seed, "media": f"media/{name}"}
                listed.append(shows | {"figures": samples[index]["scores"]})
    return listed


def _write_masks(done: Evaluation) -> list[dict[str, str]]:
    """Pictures of the masks that are known before the call."""
    from dit_accel.plans.routed import RoutedPlan

    listed = []
    with staged(done.request.output / "masks" / "all") as stage:
        for candidate in done.candidates:
            if candidate.setting is None or candidate.setting.layers is not None:
                continue
            for number, plan in enumerate(candidate.plans(done.grid)):  # of a ramp, in its first and last step
                if isinstance(plan, RoutedPlan) or plan.density == 1:
                    continue
                name = f"{slug(candidate.label)}{'-last' * number}.png"
                write_png(stage / name, plan.image())
                listed.append({"row": candidate.label, "image": f"masks/{name}"})
    return listed
