"""What fine-tuning wins back on the embedded demo: `python -m tools.demo.finetuning RUN --work FOLDER`.

A run is a recipe of that name. It prepares the demo's own clips and trains. Then it generates the same prompts and
noise three times: densely, with the method untuned, and with the trained accelerator, loaded as a user does. It adds a
row to `benchmarks/results/train-demo.jsonl`: likeness to the dense videos and to true clips, the checker's agreement,
and how everything was made. Pictures of five frames lie in the work folder. A run that was stopped goes on where it
stood.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import dit_accel
from dit_accel.checkpoint.lora import fingerprint
from dit_accel.eval.metrics.likeness import psnr
from dit_accel.eval.metrics.sets import Fid
from dit_accel.eval.networks import Clip
from dit_accel.eval.scoring import bootstrap
from dit_accel.generation.provenance import provenance
from dit_accel.pipelines.demo import clips, load_demo
from dit_accel.pipelines.demo.checker import read
from dit_accel.setting import Setting
from dit_accel.train import data, prepare
from dit_accel.train.card import Base
from dit_accel.train.loop import train
from dit_accel.train.settings import Recipe, TrainSettings, read_recipe
from dit_accel.train.state import read_losses
from tools.demo.evaluate import fixed_scenes, summarise

TRUE_CLIPS = 4
LABEL = 130  # pixels on the left of a contact sheet, for its labels
RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "train-demo.jsonl"
KINDS = ("dense", "untuned", "tuned", "dense tuned", "tuned without proxies", "heads 0.75", "heads 0.5")
# of `dit-accel tune --calibrate SHARE --method heads` on four prompts, at the size of `moh-demo`
HEADS = {
    "heads 0.75": ("1000", "0111", "1111", "1101", "1101", "1111"),
    "heads 0.5": ("1000", "0111", "1110", "1000", "0100", "1011"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """How a recipe of that name is measured.

    Args:
        dense, tuned: steps and guidance of the dense videos, and of the untuned and trained ones.
        prompts: how many are generated.
        beside: what else is trained in the same way, and what it makes is shown as: kind, method and settings.
        heads: show also what the untuned model makes with calibrated heads alone, for each share in `HEADS`.
    """

    dense: tuple[int, float] = (12, 1.0)
    tuned: tuple[int, float] = (12, 1.0)
    prompts: int = 24
    beside: tuple[str, str, dict[str, Any]] | None = None
    heads: bool = False


RUNS = {
    "sla-demo": Run(),
    "gna-demo": Run(),
    "clear-demo": Run(),
    "linear-demo": Run(),
    "consistency-demo": Run(tuned=(4, 1.0)),
    "gate-demo": Run(),
    "proxy-demo": Run(
        beside=(
            "tuned without proxies",
            "sparge",
            {"topk": 0.1, "topp": 0.0, "block": 8, "block_q": 8, "order": "tile"},
        )
    ),
    "radial-demo-2x": Run(prompts=12, beside=("dense tuned", "dense", {})),
    "sparge-demo": Run(),
    "scaledit-demo": Run(),
    "moh-demo": Run(heads=True),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the videos, in frames and pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def generate(size: Size, prompts: int, sampling: tuple[int, float], prepare_pipe: Callable[[Any], Any]) -> np.ndarray:
    """The fixed prompts' videos in these steps with this guidance, float32 [P, F, H, W, 3] in [0, 1]."""
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    prepare_pipe(pipe)
    videos = []
    for seed, scene in enumerate(fixed_scenes(prompts)):
        generator = torch.Generator().manual_seed(seed)
        call = {"num_inference_steps": sampling[0], "guidance_scale": sampling[1], **dataclasses.asdict(size)}
        videos.append(pipe(scene.caption, generator=generator, **call).frames[0])
    return np.stack(videos).astype(np.float32)


def cached(path: pathlib.Path, make_videos: Callable[[], np.ndarray]) -> np.ndarray:
    """Videos from a file, made and written first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, make_videos())
        path.with_suffix(".part").rename(path)
    return np.load(path)


def true_clips(size: Size, prompts: int) -> np.ndarray:
    """`TRUE_CLIPS` drawn clips of each fixed prompt, in the shape and range of generated ones."""
    generator = torch.Generator().manual_seed(0)
    shown = [scene for scene in fixed_scenes(prompts) for _ in range(TRUE_CLIPS)]
    drawn = clips.render(shown, size.num_frames, size.height, size.width, generator)
    return (drawn.movedim(1, -1) / 2 + 0.5).numpy()


def figures(videos: np.ndarray, dense: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Likeness to the dense videos and to true clips, and the checker's agreement with the prompts.

    PSNR is the mean over videos in decibels, 100 for identical ones; FID is of the embedded CLIP's features of all
    frames, against those of the dense videos and, "true", of true clips of the same prompts. Intervals hold 95 % of the
    bootstrap over prompts.
    """
    pairs = [[torch.from_numpy(video).movedim(-1, 1) for video in pair] for pair in zip(videos, dense, strict=True)]
    likeness = [min(psnr(video, wanted), 100.0) for video, wanted in pairs]
    measured: dict[str, Any] = {"psnr": float(np.mean(likeness))}
    for name, reference in (("fid[demo-clip]", dense), ("true fid[demo-clip]", true)):
        measured[name] = distance(videos, reference)
    scenes = fixed_scenes(len(videos))
    agreements = [read(video).agrees(scene) for video, scene in zip(videos, scenes, strict=True)]
    alone = [summarise([row]) for row in agreements]
    intervals = {name: _interval([summary[name] for summary in alone]) for name in ("joint", "all")}
    intervals["psnr"] = _interval(likeness)
    return measured | summarise(agreements) | {"intervals": intervals}


def _interval(values: list[float]) -> tuple[float, float] | None:
    return bootstrap(lambda drawn: drawn.mean((-1, -2)), len(values), values)


def distance(videos: np.ndarray, reference: np.ndarray) -> float:
    """FID of all frames' features."""
    clip = Clip.load("demo-clip")
    real, generated = (
        torch.cat([clip.features(torch.from_numpy(video).movedim(-1, 1)) for video in some])
        for some in (reference, videos)
    )
    fid = Fid(real.shape[1])
    fid.update(real, real=True)
    fid.update(generated, real=False)
    return float(fid.compute())


def write_sheet(path: pathlib.Path, rows: dict[str, np.ndarray], prompts: int = 4) -> None:
    """Five frames of the first prompts, one labelled row for each way of making them, as a PNG of twice their size."""
    strips = []
    for prompt in range(prompts):
        for videos in rows.values():
            frames = np.linspace(0, len(videos[prompt]) - 1, 5).round().astype(int)
            strip = (np.concatenate(list(videos[prompt][frames]), axis=1) * 255).round().astype(np.uint8)
            strips.append(strip.repeat(2, axis=0).repeat(2, axis=1))
    labelled(strips, [*rows] * prompts).save(path, optimize=True)


def labelled(strips: list[np.ndarray], labels: list[str]) -> Image.Image:
    """Pictures of one shape, uint8 [H, W, 3], below each other, each with a label on its left."""
    height, width = strips[0].shape[:2]
    picture = Image.new("RGB", (LABEL + width, height * len(strips)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (strip, label) in enumerate(zip(strips, labels, strict=True)):
        picture.paste(Image.fromarray(strip), (LABEL, row * height))
        lines = "\n".join(textwrap.wrap(label, 14))
        draw.text((8, (row + 0.5) * height), lines, "black", ImageFont.load_default(16), anchor="lm")
    return picture.quantize(256)


def table(path: pathlib.Path) -> str:
    """The rows of a results file as Markdown tables, one for each weights of the embedded model, the latest first.

    Colour and direction right together, FIDs, PSNR to dense. Dense videos that several runs share have one line.
    """
    weights: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        weights.setdefault(row["weights"], []).append(row)
    return "\n\n".join(map(_table, reversed(weights.values())))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | | steps, guidance | colour and direction | FID to dense | FID to true clips | PSNR to dense |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {f"| {row['size']} | dense {_cells(row, 'dense')}": None for row in rows}
    lines += dense
    for row in rows:
        kinds = [kind for kind in KINDS if kind in row and kind != "dense"]
        lines += [f"| {row['run'] if kind is kinds[0] else ''} | {kind} {_cells(row, kind)}" for kind in kinds]
    return "\n".join(lines)


def _cells(row: dict[str, Any], kind: str) -> str:
    steps, guidance = row["steps and guidance"]["dense" if kind.startswith("dense") else "method"]
    result = row[kind]
    ends = result.get("intervals", {})  # rows before 2026-11-23 lack them
    likeness = "" if kind == "dense" else f"{result['psnr']:.1f}{_ends(ends, 'psnr')} dB"
    right = f"{round(result['joint'] * row['prompts'])}{_ends(ends, 'joint', row['prompts'])} of {row['prompts']}"
    to_true = result.get("true fid[demo-clip]")  # rows before 2026-11-21T08 lack it
    fids = f"{result['fid[demo-clip]']:.1f} | {'' if to_true is None else f'{to_true:.1f}'}"
    return f"| {steps}, {guidance:g} | {right} | {fids} | {likeness} |"


def _ends(intervals: dict[str, list[float]], name: str, times: float = 1) -> str:
    if name not in intervals or intervals[name][0] == intervals[name][1]:
        return ""
    return f" ({intervals[name][0] * times:.1f} to {intervals[name][1] * times:.1f})"


def trained(recipe: Recipe, settings: TrainSettings, size: Size, work: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of a trained accelerator; trains first if it is not there."""
    if not (work / "data" / data.INDEX).exists():
        shape = dataclasses.asdict(size)
        preparer = prepare.Preparer(load_demo(), shape)
        drawn = prepare.demo_clips(recipe.data["count"], shape, seed=1)
        data.write(work / "data", preparer.encoded(drawn), preparer.conditioning("")[0], {"source": "clips", **shape})
    if not (work / name / "accelerator.json").exists():
        train(load_demo(), settings, work / "data", work / name, base=Base("demo", licence="apache-2.0"))
    return work / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[*RUNS, "table"], help="table: measure nothing, print the rows as Markdown")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/train-demo"))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    if options.run == "table":
        print(table(options.output))
        return
    mark = fingerprint(load_demo().transformer)
    cache = options.work / mark[:8]  # other weights of the demo share nothing with these
    run, work, recipe = RUNS[options.run], cache / options.run, read_recipe(options.run)
    settings = recipe.settings
    size = Size(recipe.data["frames"], recipe.data["height"], recipe.data["width"])

    def untuned(pipe: Any) -> None:
        if settings.method != "dense":
            dit_accel.accelerate(pipe, settings.method, **settings.config)

    folders = {"tuned": trained(recipe, settings, size, work, "trained")}
    if run.beside is not None:
        kind, method, config = run.beside
        alike = dataclasses.replace(settings, method=method, config=config)
        folders[kind] = trained(recipe, alike, size, work, f"{method}-trained")
    ways: dict[str, Callable[[Any], Any]] = {
        "untuned": untuned,
        **{kind: functools.partial(dit_accel.load, path=folder) for kind, folder in folders.items()},
    }
    for kind, schedule in HEADS.items() if run.heads else ():
        rows = [{"keep": tuple(map(int, heads))} for heads in schedule]
        setting = Setting.from_dict({"method": "heads", "layers": {"transformer": rows}})
        ways[kind] = functools.partial(dit_accel.accelerate, method=setting)

    def videos_of(file: pathlib.Path, sampling: tuple[int, float], way: Callable[[Any], Any]) -> np.ndarray:
        return cached(file, lambda: generate(size, run.prompts, sampling, way))

    videos = {"dense": videos_of(cache / f"dense-{size}-{run.prompts}.npy", run.dense, lambda pipe: None)}
    for kind, way in ways.items():
        videos[kind] = videos_of(work / f"{kind.replace(' ', '-')}-{run.prompts}.npy", run.tuned, way)
    steps = {kind: run.dense[0] if kind == "dense" else run.tuned[0] for kind in videos}
    write_sheet(work / "sheet.png", {f"{kind}, {steps[kind]} steps": shown for kind, shown in videos.items()})
    losses = [row["loss"] for row in read_losses(folders["tuned"] / "losses.jsonl")]
    true = true_clips(size, run.prompts)
    row = {
        "op": "train-demo",
        "weights": mark,
        "run": options.run,
        "size": str(size),
        "prompts": run.prompts,
        "clips": recipe.data["count"],
        "settings": dataclasses.asdict(settings),
        "steps and guidance": {"dense": run.dense, "method": run.tuned},
        "loss": {"first ten": float(np.mean(losses[:10])), "last ten": float(np.mean(losses[-10:]))},
        **{kind: figures(array, videos["dense"], true) for kind, array in videos.items()},
        **provenance(torch.device("cpu")),
    }
    print(json.dumps(row, indent=1))
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
