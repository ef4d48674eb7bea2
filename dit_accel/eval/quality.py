"""An evaluation of methods: checked, generated, scored, written.

Whatever can be refused is refused before the model's weights are loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.eval import gates, layout, resources
from dit_accel.eval.attention import MapChoice, parse_choice, record_attention
from dit_accel.eval.metric import ChosenMetric, choose
from dit_accel.eval.report import NAMES
from dit_accel.eval.request import EvalRequest
from dit_accel.eval.samples import Results, Store, key_of
from dit_accel.eval.scoring import features_of
from dit_accel.eval.summary import Evaluation, Summary, write
from dit_accel.eval.sweep import PromptSeed, Sweep, folder_hash
from dit_accel.files import check_folder, check_ours, hold
from dit_accel.generation import captioned, prompts, quantised, setup, sources
from dit_accel.generation.candidate import Candidate, told_apart
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.provenance import machine, versions
from dit_accel.generation.sampling import TotalBar, check_seeds, hide_bars

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.accelerator import Accelerator
    from dit_accel.generation.captioned import Captioned
    from dit_accel.generation.sources import Source


def run(
    request: EvalRequest, pipe: DiffusionPipeline | None = None, whole: TotalBar | None = None
) -> tuple[Summary | None, list[str]]:
    """What summary.json holds (None on all processes but the first), and the limits that do not hold, a line each.

    `pipe` is the model if it is loaded already, `whole` the bar of the work of which this evaluation is a part. After
    an error finished samples stay, and the next run uses them.
    """
    maps = None if request.attention_report is None else parse_choice(request.attention_report)
    with opened(request, _candidates(request.methods), maps, pipe) as evaluation:
        process, sweep, attention = evaluation.process, evaluation.sweep, []
        if maps is not None and process.main:
            wanted, folder = dataclasses.asdict(maps), request.output / "attention"

            def record(accel: Accelerator, run: Callable[[], Any]) -> dict[str, Any]:
                return record_attention(accel, run, **wanted).as_json()

            for candidate in evaluation.candidates[1:]:
                observation = sweep.observe(candidate, evaluation.items[0], "attention", wanted, record, folder)
                attention.append({"row": candidate.label, **observation})
        with contextlib.closing(_claimed(evaluation)) as claimed:
            sweep.run(evaluation.candidates, evaluation.items, whole, claimed)
        process.wait()
        sweep.results.read()
        if lost := [item for item in evaluation.items if not sweep.has(evaluation.candidates, item)]:
            raise DitAccelError(
                f"Samples of {len(lost)} prompts and seeds are missing: {request.output} has no locks, so nobody makes "
                "those of a process that cannot write. Give it write access, and run the same command again."
            )
        summary = write(evaluation, attention)
    if summary is None:
        return None, []
    figures = {row["label"]: gates.figures_of(row) for row in summary["rows"][1:]}
    return summary, gates.broken(evaluation.limits, figures)


def _claimed(evaluation: Evaluation) -> Generator[PromptSeed]:
    """The prompts and seeds whose samples this process makes: its share, of which all are checked, and what is left."""
    process, sweep, output = evaluation.process, evaluation.sweep, evaluation.request.output
    try:
        check_folder(output)
        if evaluation.request.baselines is not None:
            check_folder(evaluation.request.baselines, "--baselines")
    except DitAccelError as error:
        if process.main:
            raise
        print(f"warning: process {process.index}: {error} Other processes make its samples.", file=sys.stderr)
        return
    unseen = set(process.share(evaluation.items))

    def missing(item: PromptSeed) -> bool:
        if item in unseen or sweep.has(evaluation.candidates, item):
            return item in unseen
        sweep.results.read()
        return not sweep.has(evaluation.candidates, item)

    def place(item: PromptSeed) -> Path:
        return output / key_of(dataclasses.asdict(item))

    with contextlib.closing(process.claim(evaluation.items, place, missing)) as claimed:
        for item in claimed:
            sweep.results.read()  # another process may have made it
            unseen.discard(item)
            yield item


@contextlib.contextmanager
def opened(
    request: EvalRequest,
    candidates: list[Candidate],
    maps: MapChoice | None = None,
    pipe: DiffusionPipeline | None = None,
) -> Iterator[Evaluation]:
    """A checked evaluation, whose model is loaded and whose samples are not yet made; its folder is held."""
    checked = CheckedRequest.of(request, candidates, maps)
    process, arguments = checked.process, checked.arguments
    steps = setup.default_of(checked.source.pipeline_class(), arguments({}), "num_inference_steps")
    for candidate in candidates if isinstance(steps, int) and process.main else ():
        if candidate.setting is not None and (remark := candidate.setting.schedule.remark(steps)):
            print(f"warning: {candidate.label}: {remark}.", file=sys.stderr)
    with hold(request.output) if process.main else contextlib.nullcontext() as locked:
        if locked is False:
            print(
                f"The file system of {request.output} has no locks. Start no other evaluation into it.", file=sys.stderr
            )
        if pipe is None:
            if process.main and request.published:
                print(resources.estimate(checked, request, len(candidates), steps), file=sys.stderr)
            call_with = {"prompt": "", **arguments({})}
            pipe = request.load_pipe(checked.source, checked.dtype, checked.device, call_with)
            hide_bars(pipe)
        results = Results(request.output, process.index)
        results.read()
        for place in results.damaged if process.main else ():
            print(f"{place}, is damaged. Its sample is generated again.", file=sys.stderr)
        process.wait()
        identity = _identity(checked.source, checked.device, checked.dtype, request)
        samples, baselines = Store(request.output / "samples"), Store(request.baselines or request.output / "baseline")
        sweep = Sweep(pipe, arguments, identity, checked.device, results, samples, baselines, compile=request.compile)
        yield Evaluation(request=request, candidates=candidates, sweep=sweep, process=process, **checked.facts)


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A request whose parts fit together; no weights are loaded yet.

    Args:
        arguments: as in `Sweep`.
        facts: fields of the `Evaluation` that are known before the model is loaded.
    """

    source: Source
    process: ProcessRank
    device: torch.device
    dtype: torch.dtype
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    facts: dict[str, Any]

    @classmethod
    def of(cls, request: EvalRequest, candidates: Sequence[Candidate], maps: MapChoice | None) -> CheckedRequest:
        """Check everything that can be checked without weights; what does not fit is refused."""
        limits = [] if request.require is None else gates.parse(request.require)
        source = sources.find(request.model, request.revision)
        check_seeds(request.seeds)
        texts = prompts.read(request.prompts or ("demo" if source.kind == "embedded" else "general"))
        items = [PromptSeed(text, seed) for text in dict.fromkeys(texts.texts) for seed in request.seeds]
        sizes = source.sizes()
        shape = sizes.chosen(request.frames, request.height, request.width)
        grid = sizes.grid(*shape)
        for candidate in candidates:
            candidate.plans(grid)  # refuses what does not fit
            if request.compile:
                candidate.check_compiled()
        if request.layout is not None:
            layout.check([item.prompt for item in items], shape[0] if sizes.video else 1)
        process = ProcessRank.join(request.device)  # what one alone refuses from here on, ends the others too
        if process.main:
            check_folder(request.output)
            check_ours(request.output / name for name in NAMES)
            if request.baselines is not None:
                check_folder(request.baselines, "--baselines")
        device, dtype = setup.placement(process.device(request.device), request.dtype, request.offload)
        quantised.check(request.quantize, source, device)
        if request.real is not None and not request.real.is_dir():
            raise DitAccelError(f"--real {request.real} is not a folder. Give a folder of images or videos.")
        media = texts.media if request.real is None else tuple(captioned.find(request.real))
        images = _count_images(media)
        chosen = choose(request.metrics, source.kind == "embedded", shape[0], device)
        metrics, left_out = _fitting(chosen, images if media else None, shape[0] * len(items), device)
        gates.check_names(limits, (*gates.FIGURES, *(metric.name for metric in metrics)))
        kind = source.pipeline_class()

        def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
            defaults = source.call_defaults() | dict(options)
            whole = request.arguments(kind, defaults, shape, video=sizes.video, prompt="")
            return {name: value for name, value in whole.items() if name != "prompt"}

        steps = setup.default_of(kind, arguments({}), "num_inference_steps")
        if maps is not None and maps.steps is not None and isinstance(steps, int) and max(maps.steps) >= steps:
            raise DitAccelError(f"--attention-report names step {max(maps.steps)}, but the steps are 0 to {steps - 1}.")
        facts = {"limits": limits, "items": items, "metrics": metrics, "left_out": left_out, "media": media}
        facts |= {"images": images, "grid": grid, "fps": request.rate(kind, source, arguments({}))}
        return cls(source, process, device, dtype, arguments, facts)


def _candidates(methods: Sequence[Candidate]) -> list[Candidate]:
    """The baseline, then the methods, each once."""
    if not methods:
        raise DitAccelError("Nothing to evaluate: give --method METHOD[:KEY=VALUE,...], repeatable, or --suite FILE.")
    apart = told_apart(methods)
    labels = [candidate.label for candidate in apart]
    for label in labels:
        if labels.count(label) > 1:
            raise DitAccelError(f"{label} is listed twice. Leave one out.")
    return [Candidate(), *apart]


def _count_images(media: tuple[Captioned, ...]) -> int:
    """Frames of a real set. All of it is read once, so that a damaged file shows before the work."""
    count, first = 0, None
    for item in media:
        frames = captioned.read_frames(item.path)
        count += len(frames)
        size = frames.shape[1:3]
        first = first or (item.path, size)
        if size != first[1]:
            (one, other) = (f"{path.name} is {h}x{w}" for path, (h, w) in (first, (item.path, size)))
            raise DitAccelError(f"All files of a real set must have one size; {one}, {other}; bring them to the same.")
    return count


def _fitting(
    metrics: Sequence[ChosenMetric], real: int | None, generated: int, device: torch.device
) -> tuple[list[ChosenMetric], list[str]]:
    """The metrics for which the sets are large enough, and why the others are left out.

    One that was asked for by name is refused where it has no number at all. Without `real` images the baseline's count.
    """
    fitting, left_out = [], []
    for metric in metrics:
        declared = metric.declared
        features = 0 if declared.collect is None else features_of(metric, device)
        wanted = declared.least(features) if metric.named else declared.enough(features)
        whose, count = "this run generates", generated
        if real is not None and real < generated:
            whose, count = "the real set has", real
        if count >= wanted:
            fitting.append(metric)
            continue
        remark = f"{metric.name} needs {wanted:,} images in each set, and {whose} {count:,}"
        if metric.named:
            raise DitAccelError(f"{remark}. Add images, or leave the metric out.")
        left_out.append(remark)
    return fitting, left_out


def _identity(source: Source, device: torch.device, dtype: torch.dtype, request: EvalRequest) -> dict[str, Any]:
    """What decides the pixels beside the call: the model, the device, the dtype, and the versions."""
    identity: dict[str, Any] = {
        # A snapshot of the Hub lies in a folder named after its commit, which also decides its weights.
        "model": source.folder.name if source.kind == "hub" else folder_hash(source.folder),
        "device": machine()["gpus"] if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "options": [request.vae_tiling, request.compile],
        "versions": {name: versions()[name] for name in ("torch", "diffusers", "transformers", "triton")},
    }
    if request.quantize is not None:
        files = [folder_hash(file) for file in quantised.gguf_files(request.quantize)]
        identity |= {"quantize": [request.quantize, *files]}
    return identity
