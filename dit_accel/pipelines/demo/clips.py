"""Captioned clips made on the fly: one coloured shape that moves in one direction over a plain background.

Everything is drawn from a `torch.Generator`, so a seed names a clip for good. One combination of colour, shape,
direction and background in five is held out of training by `Scene.held_out`, a fixed rule, for evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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
EDGE = 1.5  # pixels over which a shape's edge fades
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
        generator: source of size, speed and start; the clips are drawn on its device.

    Returns:
        Float32 [B, 3, frames, height, width] in [-1, 1].

    Raises:
        ValueError: the frame is too small for a shape to move in.
    """
    words = describe(shown).to(generator.device)
    return paint(words, sample_paths(words, frames, height, width, generator), frames, height, width)


def describe(shown: list[Scene]) -> Tensor:
    """The scenes' words as indices, int64 [B, 4]: colour, shape, direction, background."""
    lists = (COLOURS, SHAPES, tuple(DIRECTIONS), BACKGROUNDS)
    rows = [(scene.colour, scene.shape, scene.direction, scene.background) for scene in shown]
    return torch.tensor([[names.index(word) for names, word in zip(lists, row, strict=True)] for row in rows])


def sample_paths(words: Tensor, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random paths for scenes [B, 4]: float32 [B, 4], x and y at half time, speed and radius, all in pixels.

    Raises:
        ValueError: the frame is too small for a shape to move in.
    """
    if min(height, width) < 32:
        raise ValueError(f"clips need a height and width of 32 pixels or more, got {height}x{width}; ask for more")
    heading = _table(DIRECTIONS.values(), words)[words[:, 2]]  # [B, 2] as (x, y)
    size = torch.tensor([width, height], dtype=torch.float32, device=words.device)
    along = (heading.abs() * size).sum(1)  # [B] extent of the frame along the motion

    steps = max(frames - 1, 1)
    uniform = torch.rand(4, len(words), generator=generator, device=words.device)
    radius = min(height, width) * (SMALLEST + (LARGEST - SMALLEST) * uniform[0])
    room = along - 2 * (radius + MARGIN)  # what the centre may travel
    speed = torch.clamp(room * (LEAST_TRAVEL + (1 - LEAST_TRAVEL) * uniform[1]) / steps, max=MAX_SPEED)

    free = size - 2 * (radius + MARGIN)[:, None] - heading.abs() * (speed * steps)[:, None]  # [B, 2]
    halfway = size / 2 + OFF_CENTRE * (uniform[2:].T - 0.5) * free.clamp(min=0)
    return torch.cat([halfway, speed[:, None], radius[:, None]], dim=1)


def paint(words: Tensor, paths: Tensor, frames: int, height: int, width: int, edge: float = EDGE) -> Tensor:
    """Clips of scenes [B, 4] along paths [B, 4]; differentiable in the paths.

    Args:
        words: what `describe` returned.
        paths: what `sample_paths` returned.
        frames, height, width: size of every clip, in frames and pixels.
        edge: pixels over which a shape's edge fades.

    Returns:
        Float32 [B, 3, frames, height, width] in [-1, 1].
    """
    colour, shape, direction, background = words.unbind(1)
    heading = _table(DIRECTIONS.values(), words)[direction]
    x, y, speed, radius = (value[:, None] for value in paths.unbind(1))  # [B, 1] each
    travelled = speed * (torch.arange(frames, device=words.device) - max(frames - 1, 1) / 2)  # [B, F]
    x = (x + heading[:, :1] * travelled)[..., None, None]
    y = (y + heading[:, 1:] * travelled)[..., None, None]
    x = (torch.arange(width, device=words.device) + 0.5).view(1, 1, 1, width) - x
    y = (torch.arange(height, device=words.device) + 0.5).view(1, 1, height, 1) - y
    outlines = _distances(x, y, radius[..., None, None])
    distance = outlines[0]
    for index in range(1, len(SHAPES)):
        distance = torch.where((shape == index).view(-1, 1, 1, 1), outlines[index], distance)
    alpha = torch.clamp(0.5 - distance / edge, 0, 1)[:, None]
    ink, paper = (
        (_table([PALETTE[name] for name in names], words) * 2 - 1)[which].view(-1, 3, 1, 1, 1)
        for names, which in ((COLOURS, colour), (BACKGROUNDS, background))
    )
    return paper + (ink - paper) * alpha


def _table(rows: Iterable[tuple[float, ...]], like: Tensor) -> Tensor:
    return torch.tensor(list(rows), device=like.device)


def _distances(x: Tensor, y: Tensor, radius: Tensor) -> list[Tensor]:
    """Signed distances in pixels from `SHAPES`, negative inside; x [B, F, 1, W] and y [B, F, H, 1] from the centre."""
    circle = torch.sqrt(x * x + y * y + 1e-6) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    # Pointing up: base at 0.8 radius below the centre, apex 1 radius above it, half base 1 radius.
    slope = 1 / 1.8  # half base over height
    side = (x.abs() - (y + radius) * slope) / (1 + slope * slope) ** 0.5
    return [circle, square, torch.maximum(side, y - 0.8 * radius)]
