"""How well the demo's videos show what their prompts say: `python -m tools.demo.evaluate`.

Prints three things together:

- how well 60 generated videos agree with their prompts; half of these are combinations that training never saw;
- how like the videos are to the nearest true clips;
- the checker on 200 true clips, which says how far to trust it;
- the checker on the same clips with shuffled captions, which says what chance gives.

`--method` and `--set` generate with accelerated attention.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from dit_accel.pipelines.demo import SIZES, WEIGHTS, Settings, clips, load_demo
from dit_accel.pipelines.demo.checker import ATTRIBUTES, Reading, read
from tools.demo.fidelity import nearest_clip

Agreement = dict[str, bool]
SHEET = 12  # videos on a contact sheet


def fixed_scenes(count: int) -> list[clips.Scene]:
    """`count` different scenes, always the same ones: held out and seen in turn, every direction as often.

    Raises:
        ValueError: `count` is below 1 or above twice the number of held-out scenes.
    """
    limit = 2 * len(clips.scenes(held_out=True))
    if not 1 <= count <= limit:
        raise ValueError(f"the number of prompts must be from 1 to {limit}, got {count}")
    queues = [_by_direction(held_out) for held_out in (True, False)]
    return [next(queues[i % 2]) for i in range(count)]


def _by_direction(held_out: bool) -> Iterator[clips.Scene]:
    """All scenes of one kind in a fixed random order, the four directions in turn."""
    pool = clips.scenes(held_out)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(2024)).tolist()
    by_direction = {way: [pool[i] for i in order if pool[i].direction == way] for way in clips.DIRECTIONS}
    for turn in zip(*by_direction.values(), strict=False):
        yield from turn


def summarise(rows: list[Agreement]) -> dict[str, float]:
    """Share of videos that agree, per attribute, for colour and direction together (`joint`) and for all four."""
    shares = {name: float(np.mean([row[name] for row in rows])) for name in (*ATTRIBUTES, "whole")}
    shares["joint"] = float(np.mean([row["colour"] and row["direction"] for row in rows]))
    shares["all"] = float(np.mean([all(row.values()) for row in rows]))
    return shares


def true_clips(settings: Settings, count: int = 200, seed: int = 7) -> tuple[dict[str, float], dict[str, float]]:
    """The checker's agreement with true captions, and with the same captions shuffled."""
    generator = torch.Generator().manual_seed(seed)
    shown = [scene for held_out in (True, False) for scene in clips.sample_scenes(count // 2, generator, held_out)]
    readings = []
    for scene in shown:
        clip = clips.render([scene], settings.num_frames, settings.height, settings.width, generator)
        readings.append(read(clip[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5))
    others = [shown[i] for i in torch.randperm(len(shown), generator=generator).tolist()]
    return _agreement(readings, shown), _agreement(readings, others)


def _agreement(readings: list[Reading], shown: list[clips.Scene]) -> dict[str, float]:
    return summarise([reading.agrees(scene) for reading, scene in zip(readings, shown, strict=True)])


def write_sheet(videos: list[np.ndarray], path: Path) -> None:
    """Five frames of each video [F, H, W, 3] in [0, 1] side by side, a row a video, as a PNG."""
    rows = [np.concatenate(list(video[np.linspace(0, len(video) - 1, 5).round().astype(int)]), 1) for video in videos]
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def accelerated(
    pipe: WanPipeline, method: str | None, settings: list[str], dense_steps: int = 0
) -> AbstractContextManager:
    """A context in which `pipe` uses `method` with `key=value` settings; nothing happens without a method."""
    if method is None:
        return nullcontext()
    import dit_accel
    from dit_accel.registry import parse_method

    name, values = parse_method(method, settings)
    return dit_accel.accelerated(pipe, name, dense_steps=dense_steps, **values)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Generate, read, fit and summarise as the command line asks; prints a row per prompt as it goes."""
    settings = SIZES[options.size]
    changes = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    settings = replace(settings, **{key: value for key, value in changes.items() if value is not None})
    pipe = load_demo(getattr(torch, options.dtype), options.device, options.weights)
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    scenes = fixed_scenes(options.prompts)
    for first in range(0, options.prompts, options.batch):
        shown = scenes[first : first + options.batch]
        generators = [torch.Generator().manual_seed(options.seed + first + i) for i in range(len(shown))]
        began = time.perf_counter()
        with accelerated(pipe, options.method, options.set, options.dense_steps):
            videos = pipe([scene.caption for scene in shown], generator=generators, **settings.call()).frames
        seconds = (time.perf_counter() - began) / len(shown)
        pixels = torch.from_numpy(videos).float().to(options.device).movedim(-1, 1) * 2 - 1
        likeness = nearest_clip(pixels, clips.describe(shown).to(options.device))[0].tolist()
        for scene, video, psnr in zip(shown, videos, likeness, strict=True):
            rows.append(_row(scene, video) | {"psnr": round(psnr, 2), "seconds": round(seconds, 2)})
            print(f"{len(rows):3d} {seconds:6.1f} s  {psnr:5.1f} dB  {_words(rows[-1])}", flush=True)
            if len(pictures) < SHEET:
                pictures.append(video)
    if options.sheet:
        write_sheet(pictures, options.sheet)
    results = {
        "size": options.size,
        "tokens": settings.tokens,
        "settings": asdict(settings),
        "method": options.method or "dense",
        "method_settings": options.set,
        "dense_steps": options.dense_steps,
        "dtype": options.dtype,
        "seed": options.seed,
        "generated": summarise([row["agrees"] for row in rows]),
        "generated_held_out": summarise([row["agrees"] for row in rows if row["held_out"]]),
        "psnr": float(np.mean([row["psnr"] for row in rows])),
        "psnr_least": min(row["psnr"] for row in rows),
        "seconds_per_video": float(np.median([row["seconds"] for row in rows])),
        "videos": rows,
    }
    if options.true_clips:
        true, shuffled = true_clips(settings, options.true_clips)
        results |= {"checker_true": true, "checker_shuffled": shuffled}
    return results


def _row(scene: clips.Scene, video: np.ndarray) -> dict[str, Any]:
    reading = read(video)
    row = {"prompt": scene.caption, "held_out": scene.held_out, "read": asdict(reading)}
    return row | {"agrees": reading.agrees(scene)}


def _words(row: dict[str, Any]) -> str:
    """A row's prompt, and what the video shows otherwise."""
    read_as = {**row["read"], "whole": f"{row['read']['objects']} objects"}
    wrong = ", ".join(f"{name} read as {read_as[name]}" for name, right in row["agrees"].items() if not right)
    return f"{'held out' if row['held_out'] else 'seen':8s}  {row['prompt']}: {wrong or 'agrees'}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--method", help="attention method of dit_accel; the model's own attention without it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    parser.add_argument("--dense-steps", type=int, default=0, help="first denoising steps without the method")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="of the first video; the next ones count up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="videos that are generated at once")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another pipeline folder")
    parser.add_argument("--true-clips", type=int, default=200, help="clips that the checker is tried on; 0 for none")
    parser.add_argument("--sheet", type=Path, help=f"PNG of five frames of each of the first {SHEET} videos")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args(argv)

    results = evaluate(options)
    print(f"\n{'':28s}" + "".join(f"{name:>12s}" for name in results["generated"]))
    lines = {
        f"{options.prompts} generated, {results['method']}": "generated",
        "  of these held out": "generated_held_out",
        f"checker, {options.true_clips} true clips": "checker_true",
        "checker, captions shuffled": "checker_shuffled",
    }
    for label, key in lines.items():
        if key in results:
            print(f"{label:28s}" + "".join(f"{share:12.1%}" for share in results[key].values()))
    print(f"{results['tokens']} tokens, {results['seconds_per_video']:.1f} s a video (median)", end=", ")
    print(f"PSNR to the nearest true clip {results['psnr']:.1f} dB (least {results['psnr_least']:.1f})")
    if options.json:
        temporary = options.json.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
