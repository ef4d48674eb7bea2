"""Reads off a video's pixels what it shows: background, and the moving object's colour, direction and shape.

Simple on purpose. The background is the median colour of the whole video. What differs from it by more than a fixed
distance is the object; its median colour is compared with the palette. Its centre is followed through the frames, and a
straight line through the centres gives the direction. How full its bounding box is gives the shape. Its pieces are
counted in every frame: a video whose object falls apart, or that shows a second one, is not whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from dit_accel.pipelines.demo.clips import BACKGROUNDS, COLOURS, DIRECTIONS, PALETTE, SHAPES, Scene

DIFFERENT = 0.22  # RGB distance from the background that makes a pixel part of the object; colours lie 0.4 apart
SMALLEST = 24  # pixels of the object in a frame, below which that frame shows none
TRAVEL = 5.0  # pixels from the first frame to the last that count as motion
STRAIGHT = 2.0  # how many times further along the main axis than across it
PIECE = 0.03  # of the largest piece's pixels, below which another one does not count
FILLS = {"circle": 0.785, "square": 1.0, "triangle": 0.53}  # share of the bounding box that each shape fills

ATTRIBUTES = ("colour", "direction", "background", "shape")


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where nothing can be read."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str
    objects: int  # most pieces in any frame

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """For each of `ATTRIBUTES`, whether the video shows what `scene` says; `whole`: one object in one piece."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES} | {"whole": self.objects == 1}

    def follows(self, prompt: str) -> bool:
        """Whether the video shows one object in one piece, and every attribute that the prompt names."""
        return self.objects == 1 and all(getattr(self, name) == word for name, word in named(prompt).items())


def named(prompt: str) -> dict[str, str]:
    """The word of each of `ATTRIBUTES` that a prompt names: "... white background" names the background."""
    words = re.findall(r"[a-z]+", prompt.lower())
    ground = words.index("background") - 1 if "background" in words[1:] else None
    object_words = [word for place, word in enumerate(words) if place != ground]
    known = {"colour": COLOURS, "direction": DIRECTIONS, "shape": SHAPES}
    words_by_attribute = {name: next((word for word in object_words if word in of), None) for name, of in known.items()}
    words_by_attribute["background"] = words[ground] if ground is not None and words[ground] in BACKGROUNDS else None
    return {name: word for name, word in words_by_attribute.items() if word is not None}


def read(video: np.ndarray) -> Reading:
    """Read a video.

    Args:
        video: float [F, H, W, 3] in [0, 1].

    Raises:
        ValueError: the array has another shape.
    """
    if video.ndim != 4 or video.shape[3] != 3:
        raise ValueError(f"the checker reads one video [frames, height, width, 3], got {video.shape}")
    paper = np.median(video.reshape(-1, 3), axis=0)
    background = _nearest(paper, BACKGROUNDS)
    distance = np.linalg.norm(video - paper, axis=-1)  # [F, H, W]
    mask = distance > DIFFERENT
    shown = mask.sum((1, 2)) >= SMALLEST
    if shown.sum() < max(2, len(video) // 2):
        return Reading(None, None, None, background, 0)

    solid = distance > 0.7 * np.quantile(distance[mask], 0.9)
    colour = _nearest(np.median(video[solid], axis=0), [name for name in COLOURS if name != background])
    shape = _shape([frame for frame, there in zip(mask, shown, strict=True) if there])
    return Reading(colour, shape, _direction(mask, shown), background, max(map(count_pieces, mask)))


def _nearest(colour: np.ndarray, names: tuple[str, ...] | list[str]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(PALETTE[name]))))


def _direction(mask: np.ndarray, shown: np.ndarray) -> str | None:
    """Where a straight line through the object's centres leads, or None if it hardly moves or moves askew."""
    times = np.flatnonzero(shown)
    centres = np.array([np.argwhere(mask[time]).mean(0) for time in times])  # [n, 2] as (y, x)
    down, right = np.polyfit(times, centres, 1)[0] * (len(mask) - 1)
    along, across = max(abs(down), abs(right)), min(abs(down), abs(right))
    if along < TRAVEL or along < STRAIGHT * across:
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _shape(masks: list[np.ndarray]) -> str:
    """The shape whose share of its bounding box is nearest to the median over the frames."""
    fill = float(np.median([_fill(mask) for mask in masks]))
    return min(SHAPES, key=lambda shape: abs(FILLS[shape] - fill))


def _fill(mask: np.ndarray) -> float:
    """Share of its bounding box that the object fills; rows and columns with next to nothing in them do not count."""
    rows, columns = mask.sum(1), mask.sum(0)
    rows, columns = np.flatnonzero(rows > 0.1 * rows.max()), np.flatnonzero(columns > 0.1 * columns.max())
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return float(box.mean())


def count_pieces(mask: np.ndarray) -> int:
    """Connected pieces of a frame's mask [H, W], corners touching included, but for specks (`PIECE`)."""
    parents: list[int] = []  # of every run of pixels in a row, up to the piece's first run
    pixels: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    above: list[tuple[int, int, int]] = []  # first, end and number of the runs in the row above
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    for row in np.diff(padded, axis=1):
        runs = []
        for first, end in zip(np.flatnonzero(row == 1).tolist(), np.flatnonzero(row == -1).tolist(), strict=True):
            parents.append(len(parents))
            pixels.append(end - first)
            runs.append((first, end, parents[-1]))
            for other_first, other_end, other in above:
                if other_first <= end and first <= other_end:
                    parents[root(parents[-1])] = root(other)
        above = runs
    sizes = np.zeros(len(parents), int)
    for run, count in enumerate(pixels):
        sizes[root(run)] += count
    return int((sizes > PIECE * sizes.max()).sum()) if len(sizes) else 0
