"""A generation from its options to its files: everything is checked before the first weight is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import values
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, check_file, check_new, check_ours, hold, staged
from dit_accel.generation import output as media
from dit_accel.generation import quantised, setup, sources
from dit_accel.generation.candidate import Candidate
from dit_accel.generation.provenance import machine, versions
from dit_accel.generation.request import GenerateRequest, method_advice
from dit_accel.generation.sampling import TimedOutput, check_seeds, sample
from dit_accel.hooks.report import NOTHING_GAINED, Report
from dit_accel.hooks.selfcheck import SelfCheck
from dit_accel.pipelines.levels import DEFAULT, LEVELS, NOTHING, Case, choose

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class GenerateJob:
    """A request whose parts fit together; no weights are loaded yet.

    Args:
        arguments: of the accelerated pipeline's call.
        dense_arguments: of the untouched one's: without the defaults of fine-tuned weights, such as few steps.
        fps: frames a second; None for a model of images.
        hint: what a level would gain, if nothing is accelerated.
        unused: a warning where the call ignores the negative prompt.
    """

    request: GenerateRequest
    candidate: Candidate
    check: SelfCheck
    source: sources.Source
    arguments: dict[str, Any]
    dense_arguments: dict[str, Any]
    fps: int | None
    grid: TokenGrid
    output: Path
    device: torch.device
    dtype: torch.dtype
    hint: str | None = None
    unused: str | None = None

    def load(self) -> DiffusionPipeline:
        """The pipeline; errors as in `ModelRequest.load_pipe`."""
        return self.request.load_pipe(self.source, self.dtype, self.device, self.arguments, self.request.lora)

    def warning(self, prompt: str) -> str | None:
        """A warning where the embedded model does not know words of the prompt."""
        from dit_accel.pipelines.demo import clips, unknown_words

        if self.source.kind != "embedded" or not (unknown := unknown_words(prompt)):
            return None
        known = ("colours", clips.COLOURS), ("shapes", clips.SHAPES), ("directions", clips.DIRECTIONS)
        lists = "; ".join(f"{name} {', '.join(words)}" for name, words in (*known, ("backgrounds", clips.BACKGROUNDS)))
        return f"warning: the demo does not know {', '.join(unknown)}, and draws something else. It knows: {lists}."

    def run(
        self,
        pipe: DiffusionPipeline,
        request: GenerateRequest,
        dense: TimedOutput | None = None,
        progress: Progress | None = None,
        *,
        warm: bool = False,
    ) -> tuple[dict[str, TimedOutput], Report]:
        """The outputs "dense", if it is compared, and "accelerated", with the report of the latter.

        The request differs from the job's only in prompt and output.

        Args:
            dense: an earlier dense output of the same call, in place of a new one.
            progress: as in `sample`.
            warm: the pipeline has made such an output before; what is compiled is warmed up nevertheless.
        """
        arguments, dense_arguments = (
            values | {"prompt": request.prompt} for values in (self.arguments, self.dense_arguments)
        )
        runs = {}
        if request.compare:
            pair: tuple[Candidate, ...] = (self.candidate, Candidate()) if dense is None else (self.candidate,)
            if not request.compile:
                pair = () if warm else pair[1:] if self.candidate.computes_densely else pair
            for candidate in pair:
                values = dense_arguments if candidate.setting is None else arguments
                setup.warm_up(pipe, values, candidate, whole=request.compile)  # so that lazy set-up is not timed
            if dense is None:
                dense = sample(pipe, dense_arguments, request.seed, "dense", self.device, progress)
            runs["dense"] = dense
        with self.candidate.apply(pipe, self.check) as accel:
            runs["accelerated"] = sample(pipe, arguments, request.seed, self.candidate.title, self.device, progress)
        return runs, accel.report()

    def make(self, pipe: DiffusionPipeline, request: GenerateRequest, *, warm: bool = False) -> list[str]:
        """Generate one output and write its files, all or none. Lines for people: the files, times and likeness.

        The request differs from the job's only in prompt and output; `warm` as in `run`.
        """
        arguments = self.arguments | {"prompt": request.prompt}
        runs, report = self.run(pipe, request, warm=warm)
        title = self.candidate.title
        path = request.output or self.output
        if runs["accelerated"].sound:
            warning = f"{type(pipe).__name__} also made sound, but {path} has none: only pictures are written."
            print(f"warning: {warning}", file=sys.stderr)
        record = {
            "note": MARK,
            "request": values.record(request),
            "pipeline": type(pipe).__name__,
            "setting": self.candidate.record(),
            "grid": dataclasses.asdict(self.grid),
            "call": {name: value for name, value in arguments.items() if name != "image"},
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "fps": self.fps,
            "runs": {name: output.record() for name, output in runs.items()},
            "compilation_timed": request.compile and not request.compare,
            "comparison": compare(**runs) if request.compare else None,
            "report": report.as_dict(),
            "versions": versions(),
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(path, record, title, runs)
        return [
            str(report),
            *_summary(path, record, title),
            *([NOTHING_GAINED] if NOTHING_GAINED in str(report) else []),
            *([self.hint] if self.hint else []),
        ]


def prepare(request: GenerateRequest) -> GenerateJob:
    """Check everything that can be checked without weights."""
    source = sources.find(request.model, request.revision)
    subject = functools.partial(request.subject, source)
    candidate = request.candidate(subject)
    verify = "--verify" if request.verify else ""
    if request.keep_dense_above is not None:
        verify = verify or f"--keep-dense-above {request.keep_dense_above:g}"
    if verify and not (request.method or request.load or request.level or request.preset):
        raise DitAccelError(f"{verify} compares a method with dense attention. {method_advice(subject().family)}")
    if verify and request.compile:
        raise DitAccelError(f"{verify} cannot check compiled attention. Leave out --compile for that run.")
    if request.compile:
        candidate.check_compiled()
    check = SelfCheck("first-call" if verify else None, request.keep_dense_above)
    check_seeds([request.seed])
    sizes = source.sizes()
    shape = sizes.chosen(request.frames, request.height, request.width)
    path = request.output or Path("output.mp4" if sizes.video else "output.png")
    pictures = not sizes.video or shape[0] == 1
    check_file(path, (media.VIDEO_ENDINGS if sizes.video else ()) + (media.IMAGE_ENDINGS if pictures else ()))
    grid = sizes.grid(*shape)
    candidate.plans(grid)  # refuses what does not fit
    setup.check_loras(request.lora)
    device, dtype = setup.placement(request.device, request.dtype, request.offload)
    quantised.check(request.quantize, source, device)
    kind, plain = source.pipeline_class(), source.call_defaults()
    image = None if request.image is None else setup.open_image(request.image)
    arguments, dense_arguments = (
        request.arguments(kind, defaults, shape, video=sizes.video, prompt=request.prompt, image=image)
        for defaults in (plain | candidate.call, plain)
    )
    fps = request.rate(kind, source, arguments) if sizes.video else None
    if grid.text:
        grid = dataclasses.replace(grid, text=arguments.get(setup.LENGTH, grid.text))
    hint = _hint(subject().case) if untouched(request) else None
    unused, scale = None, setup.unguided(kind, arguments)
    if request.negative_prompt and scale is not None:
        option = f"--pipe {setup.TRUE_SCALE}" if setup.TRUE_SCALE in setup.parameters(kind, arguments) else "--guidance"
        unused = f"warning: {option} {scale:g} ignores --negative-prompt. Give a larger scale, or leave the prompt out."
    return GenerateJob(
        request, candidate, check, source, arguments, dense_arguments, fps, grid, path, device, dtype, hint, unused
    )


def untouched(request: GenerateRequest) -> bool:
    """Whether nothing is accelerated."""
    return not (request.method or request.level or request.load or request.preset or request.cache)


def _hint(case: Case) -> str | None:
    """What a level would gain: its figure where one was measured or published; None where no level changes anything."""
    rows = [choose(level, case) for level in (DEFAULT, *LEVELS)]
    if rows[0].setting == NOTHING:
        return None
    row = next((row for row in rows if row.gain), rows[0])
    if not row.gain:
        return f"--level {row.level} may be faster than dense: {row.source}"
    return f"--level {row.level} was {row.gain}: {row.source}"


@contextlib.contextmanager
def reserved(job: GenerateJob) -> Iterator[None]:
    """Keep other runs out of the job's one output during the block; errors as in `hold` and `check_outputs`."""
    check_outputs([job.output], job.request)
    with hold(job.output, folder=False) as locked:
        if not locked:
            print(f"warning: {job.output.parent} has no locks. Start no other run for {job.output}.", file=sys.stderr)
        check_outputs([job.output], job.request)  # of a run that has ended since
        yield


def check_outputs(outputs: Iterable[Path], request: GenerateRequest) -> None:
    """Refuse outputs with a file that exists, or that is not ours with --overwrite."""
    tags = ("dense", "compare") if request.compare else ()
    for path in outputs:
        siblings = [path.with_name(media.sibling(path, tag)) for tag in tags]
        files = [path, path.with_suffix(".json"), *siblings]
        check_ours(files)
        if not request.overwrite:
            check_new(files)


def compare(dense: TimedOutput, accelerated: TimedOutput) -> dict[str, float | None]:
    """Speed and likeness of two runs; psnr is None where the frames are identical (it would be infinite)."""
    import torch

    from dit_accel.eval.metrics.likeness import psnr, ssim

    frames, wanted = (torch.from_numpy(output.frames).movedim(-1, 1) for output in (accelerated, dense))
    decibels = psnr(frames, wanted)
    return {
        "speedup": dense.seconds / accelerated.seconds,
        "denoising_speedup": dense.denoising_seconds / accelerated.denoising_seconds,
        "psnr": decibels if math.isfinite(decibels) else None,
        "ssim": ssim(frames, wanted),
    }


def _write(path: Path, record: dict[str, Any], title: str, runs: dict[str, TimedOutput]) -> None:
    """All files of a run, or none of them."""
    fps = record["fps"] or 1
    pixels = {name: (output.frames * 255).round().astype("uint8") for name, output in runs.items()}
    with staged(path) as stage:
        media.write_frames(stage / path.name, pixels["accelerated"], fps)
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        (stage / f"{path.stem}.json").write_text(text, encoding="utf-8")
        if "dense" in runs:
            dense, output = runs["dense"], runs["accelerated"]
            captions = (f"dense: {dense.seconds:.1f} s", f"{title}: {output.seconds:.1f} s")
            both = media.side_by_side(pixels["dense"], pixels["accelerated"], captions, likeness(record["comparison"]))
            media.write_frames(stage / media.sibling(path, "dense"), pixels["dense"], fps)
            media.write_frames(stage / media.sibling(path, "compare"), both, fps)


def _summary(path: Path, record: dict[str, Any], title: str) -> list[str]:
    lines = []
    for name, run in record["runs"].items():
        label = "dense" if name == "dense" else title
        times = f"{run['seconds']:.2f} s, of which {run['denoising_seconds']:.2f} s denoising"
        lines.append(f"{label}: {times}{', with compilation' if record['compilation_timed'] else ''}")
    if record["comparison"]:
        lines.append(likeness(record["comparison"]))
        lines.append(f"side by side: {path.with_name(media.sibling(path, 'compare'))}")
        lines.append(f"dense:        {path.with_name(media.sibling(path, 'dense'))}")
    return [*lines, f"output:       {path}", f"record:       {path.with_suffix('.json')}"]


def likeness(comparison: dict[str, float | None]) -> str:
    """Speed-up, PSNR and SSIM in one line."""
    decibels = comparison["psnr"]
    psnr = "identical frames" if decibels is None else f"PSNR {decibels:.1f} dB"
    return f"{comparison['speedup']:.2f} times as fast, {psnr}, SSIM {comparison['ssim']:.3f}"
