"""How well the embedded CLIP tells captions apart: `python -m tools.demo_clip.accuracy`.

A pair is a frame with its caption and a caption with exactly one wrong visible attribute. It counts as right if the
right caption is more similar. All pairs of all held-out scenes are tried, on clean and on spoilt frames.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.eval.networks import Clip
from dit_accel.pipelines.demo import clips
from tools.demo_clip.frames import VISIBLE, blur, difference, draw, never_shown, variants

Spoil = Callable[[Tensor, torch.Generator], Tensor]


def noisy(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.1."""
    return (frames + 0.1 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)


CONDITIONS: dict[str, Spoil] = {
    "clean": lambda frames, _: frames,
    "blur 2 px": lambda frames, _: blur(frames, torch.full((len(frames),), 2.0)),
    "noise 0.1": noisy,
}


def pair_accuracy(
    clip: Clip, scenes: list[clips.Scene], spoil: Spoil, size: tuple[int, int] = (128, 128), seed: int = 0
) -> dict[str, float]:
    """Share of pairs told apart, for each visible attribute and for all (`all`), with the number of `pairs`.

    Args:
        clip: the model.
        scenes: one frame of a new clip is drawn for each.
        spoil: what is done to the frames.
        size: height and width of the frames.
        seed: of the clips and of what is done to them.
    """
    generator = torch.Generator().manual_seed(seed)
    images = clip.images(spoil(draw(scenes, size, generator), generator))  # [B, D]
    outcomes: dict[str, list[bool]] = {name: [] for name in VISIBLE}
    for image, scene in zip(images, scenes, strict=True):
        others = variants(scene)
        right, *wrong = (clip.texts([scene.caption, *(other.caption for other in others)]) @ image).tolist()
        for other, likeness in zip(others, wrong, strict=True):
            outcomes[difference(scene, other)].append(right > likeness)
    everything = [outcome for some in outcomes.values() for outcome in some]
    shares = {name: sum(some) / len(some) for name, some in outcomes.items()}
    return {**shares, "all": sum(everything) / len(everything), "pairs": len(everything)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default="demo-clip", help="'demo-clip', or a folder that train.py wrote")
    parser.add_argument("--times", type=int, default=4, help="clips drawn of each held-out scene")
    parser.add_argument("--size", default="128x128", help="height x width of the frames")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here too")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    held_out = list(clips.scenes(held_out=True)) * options.times
    pools = {"held out": held_out, "never shown": [scene for scene in held_out if never_shown(scene)]}
    clip = Clip.load(options.clip)
    figures = {
        f"{pool}, {name}": pair_accuracy(clip, scenes, spoil, (height, width))
        for pool, scenes in pools.items()
        for name, spoil in CONDITIONS.items()
    }
    for name, row in figures.items():
        shares = "  ".join(f"{key} {100 * value:5.1f} %" for key, value in row.items() if key != "pairs")
        print(f"{name:24s} {shares}  ({row['pairs']} pairs)")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
