"""Captioned clips made on the fly: one coloured shape that moves in one direction over a plain background.

Everything is drawn from a `torch.Generator`, so a seed names a clip for good. One combination of colour, shape,
direction and background in five is held out of training by `Scene.held_out`, a fixed rule, for evaluation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# RGB in [0, 1]. The object and the background share one list of names and never the same name in one clip.
PALETTE = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.98, 0.88, 0.15),
    "purple": (0.58, 0.15, 0.72),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.06),
    "gray": (0.50, 0.50, 0.50),
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x right, y down
BACKGROUNDS = ("black", "white", "gray", "blue", "green")

CAPTION = "a {colour} {shape} moves {direction} on a {background} background"
PARAPHRASES = (
    "a {colour} {shape} moving {direction} on a {background} background",
    "a {colour} {shape} moves to the {direction} over a {background} background",
    "{colour} {shape} moving {direction}, {background} background",
)
EDGE = 4.0  # pixels over which a shape's edge fades: one block of the codec
MARGIN = 2.0  # pixels that stay free between the shape and the frame's border
SMALLEST, LARGEST = 1 / 6, 2 / 9  # radius, of the frame's shorter side
OFF_CENTRE = 0.2  # how much of the free space around the middle a path may stray
LEAST_TRAVEL = 0.85  # of the way that is free between the borders
MAX_SPEED = 12.0  # pixels a frame


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in words."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        return self.phrase(CAPTION)

    @property
    def held_out(self) -> bool:
        """True for the one combination in five that training never draws."""
        code = (
            COLOURS.index(self.colour)
            + 2 * SHAPES.index(self.shape)
            + list(DIRECTIONS).index(self.direction)
            + 3 * BACKGROUNDS.index(self.background)
        )
        return code % 5 == 0

    def phrase(self, template: str) -> str:
        """`template` with the scene's four words put in."""
        return template.format(
            colour=self.colour, shape=self.shape, direction=self.direction, background=self.background
        )


@cache
def scenes(held_out: bool) -> tuple[Scene, ...]:
    """All scenes that are held out of training, or all that are not."""
    every = (Scene(*words) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
    return tuple(scene for scene in every if scene.colour != scene.background and scene.held_out == held_out)


def sample_scenes(count: int, generator: torch.Generator, held_out: bool = False) -> list[Scene]:
    """`count` scenes drawn with replacement from the training scenes, or from the held-out ones."""
    pool = scenes(held_out)
    return [pool[i] for i in torch.randint(len(pool), (count,), generator=generator).tolist()]


def render(shown: list[Scene], frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw one clip per scene with a random size, speed and start; the shape stays inside the frame.

    Args:
        shown: B scenes.
        frames, height, width: size of every clip, in frames and pixels; height and width at least 32.
        generator: source of size, speed and start.

    Returns:
        Float32 [B, 3, frames, height, width] in [-1, 1].

    Raises:
        ValueError: the frame is too small for a shape to move in.
    """
    if min(height, width) < 32:
        raise ValueError(f"clips need a height and width of 32 pixels or more, got {height}x{width}; ask for more")
    count = len(shown)
    heading = torch.tensor([DIRECTIONS[scene.direction] for scene in shown])  # [B, 2] as (x, y)
    size = torch.tensor([width, height], dtype=torch.float32)
    along = (heading.abs() * size).sum(1)  # [B] extent of the frame along the motion

    steps = max(frames - 1, 1)
    uniform = torch.rand(4, count, generator=generator)
    radius = min(height, width) * (SMALLEST + (LARGEST - SMALLEST) * uniform[0])
    room = along - 2 * (radius + MARGIN)  # what the centre may travel
    speed = torch.clamp(room * (LEAST_TRAVEL + (1 - LEAST_TRAVEL) * uniform[1]) / steps, max=MAX_SPEED)

    middle = size / 2
    free = size - 2 * (radius + MARGIN)[:, None] - heading.abs() * (speed * steps)[:, None]  # [B, 2]
    halfway = middle + OFF_CENTRE * (uniform[2:].T - 0.5) * free.clamp(min=0)
    offset = torch.arange(frames) - steps / 2  # [F]
    centre = halfway[:, None] + heading[:, None] * (speed[:, None] * offset)[..., None]  # [B, F, 2]

    x = (torch.arange(width) + 0.5).view(1, 1, 1, width) - centre[..., 0, None, None]
    y = (torch.arange(height) + 0.5).view(1, 1, height, 1) - centre[..., 1, None, None]
    alpha = torch.empty(count, frames, height, width)
    for shape in SHAPES:
        picked = [i for i, scene in enumerate(shown) if scene.shape == shape]
        if picked:
            distance = _distance(shape, x[picked], y[picked], radius[picked].view(-1, 1, 1, 1))
            alpha[picked] = torch.clamp(0.5 - distance / EDGE, 0, 1)

    ink = torch.tensor([PALETTE[scene.colour] for scene in shown]).view(count, 3, 1, 1, 1) * 2 - 1
    paper = torch.tensor([PALETTE[scene.background] for scene in shown]).view(count, 3, 1, 1, 1) * 2 - 1
    return paper + (ink - paper) * alpha[:, None]


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels from the outline, negative inside; x [B, F, 1, W], y [B, F, H, 1] from the centre."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    # Pointing up: base at 0.8 radius below the centre, apex 1 radius above it, half base 1 radius.
    slope = 1 / 1.8  # half base over height
    side = (x.abs() - (y + radius) * slope) / (1 + slope * slope) ** 0.5
    return torch.maximum(side, y - 0.8 * radius)
