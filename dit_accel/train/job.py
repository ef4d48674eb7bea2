"""A training run from its options to its folder; errors in the request come before any weight is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dit_accel import values
from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora
from dit_accel.errors import DitAccelError
from dit_accel.files import check_file, check_folder, check_ours
from dit_accel.generation import quantised, sources
from dit_accel.generation.processes import meet
from dit_accel.generation.provenance import free_memory
from dit_accel.generation.setup import placement
from dit_accel.pipelines.targets import find_transformers
from dit_accel.setting import Setting
from dit_accel.train import card
from dit_accel.train.data import Dataset, write
from dit_accel.train.processes import check_tracker, mixed_precision, reserved
from dit_accel.train.request import CLIPS, GENERATED, DataSettings, TrainRequest
from dit_accel.train.settings import INDEX
from dit_accel.train.state import LOSSES, read_losses

MOST_LORA = 10  # times the transformer's own weights

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def run(request: TrainRequest) -> list[str]:
    """Prepare data, train or search, and return lines that state the results.

    Raises:
        DitAccelError: the request cannot be carried out, or training had to stop; checkpoints stay.
    """
    import torch

    from dit_accel.train.networks import check_family

    run = request.run
    check_tracker(request.train.tracker)
    processes = meet(run.device)  # others wait while the first prepares the data
    request.data.check()
    candidates = [] if run.search is None else run.candidate_configs(request.train.method)
    source = sources.find(run.model, run.revision)
    if source.modular:
        raise DitAccelError(
            f"{run.model} is a modular pipeline, which generate and eval accept but train does not; give a pipeline "
            f"with a {sources.INDEX}."
        )
    quantised.check_trainable(source)
    check_family(source.family())
    sizes = source.sizes()
    shape = sizes.chosen(request.data.frames, request.data.height, request.data.width)
    size = {"height": shape[1], "width": shape[2]} | ({"num_frames": shape[0]} if sizes.video else {})
    _check_output(request)
    device = processes.device if run.device == "auto" else placement(run.device, "float32", "none")[0]
    precision = mixed_precision(request.train.precision, device)
    frozen = request.train.rank > 0 and precision == "bf16" and device.type == "cuda"
    folder = pathlib.Path(request.data.source) if request.data.prepared else run.output / "data"
    about = _about(request, size)
    with reserved(run.output, processes.is_main_process):
        if not request.data.prepared and (folder / INDEX).is_file():
            _check_data(folder, about)
        pipe = sources.load(source, torch.bfloat16 if frozen else torch.float32, device)
        if run.search is None and not run.prepare:
            _check_memory(pipe, request, sizes.grid(*shape).visual, device)
        with processes.main_process_first():
            if processes.is_main_process and not (folder / INDEX).is_file():
                _prepare(pipe, request, size, source.call_defaults(), folder, about)
        if run.prepare:
            return [f"training data: {folder}, {len(Dataset(folder))} samples"]
        if run.search is not None:
            steps = source.call_defaults().get("num_inference_steps", 50)
            return _search(pipe, request, candidates, folder, steps)
    from dit_accel.train.card import Base
    from dit_accel.train.loop import train
    from dit_accel.train.state import Validation

    call: dict[str, Any] = {}
    if "consistency" in request.train.objectives:
        call = {"num_inference_steps": request.train.distillation.segments, "guidance_scale": 1.0}
    validation = Validation(run.samples, source.call_defaults() | size | call, source.fps) if run.samples else None
    train(pipe, request.train, folder, run.output, base=Base.of(source), validation=validation, call=call)
    load = f"dit-accel generate --model {run.model} --load {run.output}"
    return [f"trained: {run.output}", f"try it: {load}"] if processes.is_main_process else []


def _check_output(request: TrainRequest) -> None:
    """Refuse an output that would replace what is not ours, before any weight is loaded."""
    run = request.run
    if run.search is not None:
        check_file(run.search, (".json",), "--search")
        check_ours([run.search], "--search")
        if run.search.exists():
            raise DitAccelError(f"--search {run.search} exists already. Choose another name, or remove it.")
    check_folder(run.output)
    if run.search is None and not run.prepare:
        files = (card.CARD, *checkpoint.FILES, lora.LORA_FILE)
        check_ours(run.output / name for name in files)
        if os.path.lexists(run.output / LOSSES):
            read_losses(run.output / LOSSES)


def _about(request: TrainRequest, size: Mapping[str, int]) -> dict[str, Any]:
    """How the data of a request is made, for its index."""
    return {"model": request.run.model, **dataclasses.asdict(request.data), **size}


def _check_data(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Refuse data that another request has made; `frames` is as typed, `num_frames` what came of it."""
    saved = Dataset(folder).about
    flags = {"model": "--model", "num_frames": "--frames"}
    flags |= {field.name: values.flag(field) for field in dataclasses.fields(DataSettings) if field.name != "frames"}
    for name, flag in flags.items():
        if name in about and name in saved and saved[name] != about[name]:
            was, present = ("not given" if value is None else value for value in (saved[name], about[name]))
            raise DitAccelError(
                f"{folder} belongs to another run: its {flag} was {was} and is {present} now. Give another --output, "
                "or delete that folder to make the data again."
            )


def _check_memory(pipe: DiffusionPipeline, request: TrainRequest, tokens: int, device: torch.device) -> None:
    """Refuse a run whose LoRA and activations alone take more than is free."""
    from dit_accel.train.loop import least_memory

    settings, transformers = request.train, list(find_transformers(pipe)[0].values())
    parts = least_memory(*transformers[0], settings, tokens, device)
    free = free_memory(device)
    if sum(parts.values()) > free:
        worst = max(parts, key=lambda flag: parts[flag])
        value = getattr(settings, worst.removeprefix("--"))
        needs = f"{worst} {value} takes at least {parts[worst] / 1e9:,.1f} GB"
        raise DitAccelError(f"{needs}, and {free / 1e9:,.1f} GB are free on {device}. Choose a smaller number.")
    count = sum(weight.numel() for weight in transformers[0][0].parameters())
    if parts["--rank"] > MOST_LORA * 4 * 4 * count:
        raise DitAccelError(
            f"--rank {settings.rank} is a LoRA of {parts['--rank'] // 16:,} weights, but the model has {count:,}. "
            "Choose a smaller rank, or --rank 0, which trains the transformer's own."
        )


def _prepare(
    pipe: DiffusionPipeline,
    request: TrainRequest,
    size: Mapping[str, int],
    defaults: Mapping[str, Any],
    folder: pathlib.Path,
    about: Mapping[str, Any],
) -> None:
    from dit_accel.train import prepare

    data, seed = request.data, request.train.seed
    preparer = prepare.Preparer(pipe, size, **({} if data.guidance is None else {"guidance": data.guidance}))
    if data.source == GENERATED:
        sampling = {"num_inference_steps": data.steps, "guidance_scale": data.guidance}
        arguments = dict(defaults) | {key: value for key, value in sampling.items() if value is not None}
        samples = preparer.generated(data.read_prompts(), arguments, seed)
    elif data.source == CLIPS:
        samples = preparer.encoded(prepare.demo_clips(data.count or 256, size, seed))
    else:
        media = prepare.captioned(pathlib.Path(data.source), size)
        samples = preparer.encoded(itertools.islice(media, data.count))
    write(folder, samples, preparer.conditioning("")[0], about)


def _search(
    pipe: DiffusionPipeline, request: TrainRequest, candidates: list[Any], folder: pathlib.Path, steps: int
) -> list[str]:
    from dit_accel.generation.sampling import progress_bar
    from dit_accel.train import search

    assert request.run.search is not None
    threshold, budget = request.run.threshold, 1.0 if request.run.budget is None else request.run.budget
    with progress_bar() as bar:
        task = bar.add_task("layers", total=None)
        table = search.measure(
            pipe,
            request.train.method,
            candidates,
            Dataset(folder),
            seed=request.train.seed,
            budget=budget,
            steps=steps,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if threshold is not None:
        chosen, how = search.greedy(table, threshold), {"threshold": threshold}
    else:
        chosen, how = search.budgeted(table, budget), {"budget": budget}
    setting = Setting(table.method, layers=table.layers(chosen))
    search.write(request.run.search, table, chosen, setting, {"model": request.run.model, **how})
    dense = sum(index is None for index in chosen)
    return [
        f"layer schedule: {request.run.search}",
        f"density {table.cost(chosen):.4f}, loss {table.loss(chosen):.4g}, {dense} of {len(chosen)} layers dense",
    ]
