"""A training from its options to its folder: what can be refused is refused before the first weight is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dit_accel import registry, values
from dit_accel.errors import DitAccelError
from dit_accel.generation import prompts, sources
from dit_accel.generation.call import placement
from dit_accel.generation.processes import meet
from dit_accel.generation.sizes import sizes_of
from dit_accel.train import settings as settings_module
from dit_accel.train.data import INDEX, Dataset, write
from dit_accel.train.settings import TrainSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.train.loop import Base
    from dit_accel.train.validation import Validation

GENERATED, CLIPS, FOLDER = "generated", "clips", "folder"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where training data come from.

    Args:
        source: "generated" (the dense model makes them from prompts), "clips" (the embedded demo's own), "folder" (a
            recipe's word for: give one), or a folder: of captioned media, or prepared.
        frames, height, width: of a sample; None is the model's own.
        steps, guidance: of generated samples; None is the model's own.
        prompts: for generated samples: a text file with one a line, a built-in list, or a folder of captioned media.
        count: of clips, or the first prompts to use; None is 256 clips, or all prompts.

    Raises:
        DitAccelError: a value is of the wrong kind or out of range.
    """

    source: str = GENERATED
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    prompts: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        values.check(self)
        for name in ("frames", "height", "width", "steps", "count"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DitAccelError(f"{name} of the data is at least 1, got {getattr(self, name)}.")

    @property
    def prepared(self) -> bool:
        """Whether the source is a data folder already."""
        return (pathlib.Path(self.source) / INDEX).is_file()

    def check(self) -> None:
        """See now that the source is there.

        Raises:
            DitAccelError: it is not, or prompts are missing.
        """
        if self.source == FOLDER:
            raise DitAccelError("This recipe is for your own captioned videos: give their folder with --data FOLDER.")
        if self.source == GENERATED:
            self.read_prompts()
        elif self.source != CLIPS and not pathlib.Path(self.source).is_dir():
            raise DitAccelError(
                f"There is no training data {self.source}: give a folder (prepared, or captioned media), {GENERATED!r} "
                f"with --prompts FILE, or {CLIPS!r} for the demo's own clips."
            )
        elif self.source != CLIPS and not self.prepared:
            from dit_accel.train.prepare import find_captioned

            find_captioned(pathlib.Path(self.source))

    def read_prompts(self) -> list[str]:
        """The prompts; see `dit_accel.generation.prompts`.

        Raises:
            DitAccelError: there are none, or they cannot be read.
        """
        if self.prompts is None:
            raise DitAccelError(
                "Samples that the model makes itself need prompts: give --prompts FILE, one a line, or the name of a "
                "list or a captioned folder."
            )
        return list(prompts.read(self.prompts).texts[: self.count])


@dataclasses.dataclass(frozen=True)
class Request:
    """What `dit-accel train` was asked for; each field is the option of that name."""

    model: str
    revision: str | None
    data: DataSettings
    train: TrainSettings
    output: pathlib.Path
    prepare: bool
    prompts: tuple[str, ...]
    device: str
    search: pathlib.Path | None = None
    candidates: tuple[str, ...] = ()
    threshold: float | None = None
    budget: float | None = None


def run(request: Request) -> list[str]:
    """Prepare data, train or search, and say what was done.

    Raises:
        DitAccelError: something asked for cannot be done, or training had to stop; checkpoints stay.
    """
    import torch

    processes = meet(request.device)  # others wait while the first prepares the data
    request.data.check()
    candidates = [] if request.search is None else _candidates(request)
    source = sources.find(request.model, request.revision)
    sizes = sizes_of(source)
    shape = sizes.chosen(request.data.frames, request.data.height, request.data.width)
    size = {"height": shape[1], "width": shape[2]} | ({"num_frames": shape[0]} if sizes.video else {})
    device = processes.device if request.device == "auto" else placement(request.device, "float32", "none")[0]
    frozen = request.train.rank > 0 and request.train.precision == "bf16" and device.type == "cuda"
    pipe = sources.load(source, torch.bfloat16 if frozen else torch.float32, device)

    folder = pathlib.Path(request.data.source) if request.data.prepared else request.output / "data"
    with processes.main_process_first():
        if processes.is_main_process and not (folder / INDEX).is_file():
            _prepare(pipe, request, size, sources.call_defaults(source), folder)
    if request.prepare:
        return [f"training data: {folder}, {len(Dataset(folder))} samples"]
    if request.search is not None:
        return _search(pipe, request, candidates, folder)
    from dit_accel.train.loop import train

    call = _call(request)
    validation = _validation(request, sources.call_defaults(source) | size | call, sources.frames_a_second(source))
    train(pipe, request.train, folder, request.output, base=_base(source), validation=validation, call=call)
    load = f"dit-accel generate --model {request.model} --load {request.output}"
    return [f"trained: {request.output}", f"try it: {load}"] if processes.is_main_process else []


def _prepare(
    pipe: DiffusionPipeline,
    request: Request,
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
    write(folder, samples, preparer.negative(), {"model": request.model, **dataclasses.asdict(data), **size})


def _call(request: Request) -> dict[str, Any]:
    """Arguments of the pipeline's call that the result is for."""
    if "consistency" not in request.train.objectives:
        return {}
    return {"num_inference_steps": request.train.distillation.segments, "guidance_scale": 1.0}


def _validation(request: Request, arguments: Mapping[str, Any], fps: int) -> Validation | None:
    from dit_accel.train.validation import Validation

    return Validation(request.prompts, arguments, fps) if request.prompts else None


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


def _candidates(request: Request) -> list[dict[str, Any]]:
    """The settings that a layer search tries, checked."""
    if (request.threshold is None) == (request.budget is None):
        raise DitAccelError("A layer search needs either --threshold or --budget, not both.")
    if not request.candidates:
        raise DitAccelError("A layer search needs settings to try: give --candidate KEY=VALUE,..., several times.")
    method = request.train.method
    found = [registry.parse_method(f"{method}:{text}")[1] for text in request.candidates]
    for settings in found:
        registry.make_config(method, settings)
    return found


def _search(
    pipe: DiffusionPipeline, request: Request, candidates: list[dict[str, Any]], folder: pathlib.Path
) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    from dit_accel.train import search

    assert request.search is not None
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
    if request.threshold is not None:
        chosen, how = search.greedy(table, request.threshold), {"threshold": request.threshold}
    else:
        assert request.budget is not None
        chosen, how = search.budgeted(table, request.budget), {"budget": request.budget}
    search.write(request.search, table, chosen, model=request.model, **how)
    dense = sum(index is None for index in chosen)
    return [
        f"layer schedule: {request.search}",
        f"density {table.cost(chosen):.4f}, loss {table.loss(chosen):.4g}, {dense} of {len(chosen)} layers dense",
    ]


def read_objectives(items: list[str]) -> dict[str, float]:
    """Objectives written NAME=WEIGHT, or NAME for a weight of 1.

    Raises:
        DitAccelError: a weight is no number.
    """
    found = {}
    for item in items:
        name, equals, weight = item.partition("=")
        value = registry.parse_value(weight) if equals else 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DitAccelError(f"An objective is written NAME=WEIGHT, such as teacher=1.0; got {item!r}.")
        found[name] = float(value)
    return found


def read_options(items: list[str]) -> dict[str, Any]:
    """Further settings of the training, KEY=VALUE; those of `levels` and `distillation` as levels.shift=5.

    Raises:
        DitAccelError: an item is not KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not text:
            raise DitAccelError(f"--option takes KEY=VALUE, such as ema=0.99 or levels.shift=5; got {item!r}.")
        outer, dot, inner = key.partition(".")
        if dot:
            if not isinstance(found.setdefault(outer, {}), dict):
                raise DitAccelError(f"--option {item} does not go with {outer}={found[outer]!r}; give one of them.")
            found[outer][inner] = registry.parse_value(text)
        else:
            found[outer] = tuple(text.split(",")) if outer == "targets" else registry.parse_value(text)
    return found


def merge(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> TrainSettings:
    """A recipe's settings with those that were given, which win; nested ones are merged."""
    merged = dict(recipe)
    for name, value in given.items():
        nested = name in ("levels", "distillation") and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if nested else value
    return settings_module.make(merged)
