"""A training from its options to its folder: what can be refused is refused before the first weight is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dit_accel.generation import sources
from dit_accel.generation.call import placement
from dit_accel.generation.processes import meet
from dit_accel.train.data import Dataset, write
from dit_accel.train.request import CLIPS, GENERATED, TrainRequest
from dit_accel.train.settings import INDEX

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.train.loop import Base
    from dit_accel.train.validation import Validation


def run(request: TrainRequest) -> list[str]:
    """Prepare data, train or search, and say what was done.

    Raises:
        DitAccelError: something asked for cannot be done, or training had to stop; checkpoints stay.
    """
    import torch

    run = request.run
    processes = meet(run.device)  # others wait while the first prepares the data
    request.data.check()
    candidates = [] if run.search is None else run.candidate_settings(request.train.method)
    source = sources.find(run.model, run.revision)
    sizes = source.sizes()
    shape = sizes.chosen(request.data.frames, request.data.height, request.data.width)
    size = {"height": shape[1], "width": shape[2]} | ({"num_frames": shape[0]} if sizes.video else {})
    device = processes.device if run.device == "auto" else placement(run.device, "float32", "none")[0]
    frozen = request.train.rank > 0 and request.train.precision == "bf16" and device.type == "cuda"
    pipe = sources.load(source, torch.bfloat16 if frozen else torch.float32, device)

    folder = pathlib.Path(request.data.source) if request.data.prepared else run.output / "data"
    with processes.main_process_first():
        if processes.is_main_process and not (folder / INDEX).is_file():
            _prepare(pipe, request, size, source.call_defaults(), folder)
    if run.prepare:
        return [f"training data: {folder}, {len(Dataset(folder))} samples"]
    if run.search is not None:
        return _search(pipe, request, candidates, folder)
    from dit_accel.train.loop import train

    call = _call(request)
    validation = _validation(request, source.call_defaults() | size | call, source.fps)
    train(pipe, request.train, folder, run.output, base=_base(source), validation=validation, call=call)
    load = f"dit-accel generate --model {run.model} --load {run.output}"
    return [f"trained: {run.output}", f"try it: {load}"] if processes.is_main_process else []


def _prepare(
    pipe: DiffusionPipeline,
    request: TrainRequest,
    size: Mapping[str, int],
    defaults: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    from dit_accel.train import prepare

    data, seed = request.data, request.train.seed
    preparer = prepare.Preparer(pipe, size, **({} if data.guidance is None else {"guidance": data.guidance}))
    if data.source == GENERATED:
        asked = {"num_inference_steps": data.steps, "guidance_scale": data.guidance}
        arguments = dict(defaults) | {key: value for key, value in asked.items() if value is not None}
        samples = preparer.generated(data.read_prompts(), arguments, seed)
    elif data.source == CLIPS:
        samples = preparer.encoded(prepare.demo_clips(data.count or 256, size, seed))
    else:
        media = prepare.captioned(pathlib.Path(data.source), size)
        samples = preparer.encoded(itertools.islice(media, data.count))
    write(folder, samples, preparer.negative(), {"model": request.run.model, **dataclasses.asdict(data), **size})


def _call(request: TrainRequest) -> dict[str, Any]:
    """Arguments of the pipeline's call that the result is for."""
    if "consistency" not in request.train.objectives:
        return {}
    return {"num_inference_steps": request.train.distillation.segments, "guidance_scale": 1.0}


def _validation(request: TrainRequest, arguments: Mapping[str, Any], fps: int) -> Validation | None:
    from dit_accel.train.validation import Validation

    return Validation(request.run.samples, arguments, fps) if request.run.samples else None


def _base(source: sources.Source) -> Base:
    from dit_accel.train.loop import Base

    licence = "apache-2.0" if source.kind == "embedded" else _licence(source.folder / "README.md")
    return Base(source.model, source.revision, licence)


def _licence(card: pathlib.Path) -> str | None:
    """The licence in the header of a model card that lies beside the model."""
    if not card.is_file():
        return None
    header = card.read_text(encoding="utf-8", errors="replace").split("---")
    lines = header[1].splitlines() if len(header) > 2 else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("license_name") or found.get("license")


def _search(
    pipe: DiffusionPipeline, request: TrainRequest, candidates: list[dict[str, Any]], folder: pathlib.Path
) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    from dit_accel.train import search

    assert request.run.search is not None
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("layers", total=None)
        table = search.measure(
            pipe,
            request.train.method,
            candidates,
            Dataset(folder),
            seed=request.train.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if request.run.threshold is not None:
        chosen, how = search.greedy(table, request.run.threshold), {"threshold": request.run.threshold}
    else:
        assert request.run.budget is not None
        chosen, how = search.budgeted(table, request.run.budget), {"budget": request.run.budget}
    search.write(request.run.search, table, chosen, model=request.run.model, **how)
    dense = sum(index is None for index in chosen)
    return [
        f"layer schedule: {request.run.search}",
        f"density {table.cost(chosen):.4f}, loss {table.loss(chosen):.4g}, {dense} of {len(chosen)} layers dense",
    ]
