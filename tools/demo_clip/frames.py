"""Single frames of the demo's captioned clips, clean or spoilt, and which combinations training may draw."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.clips import Scene

SIDE = 64  # pixels of the image tower's input
SIZES = ((64, 64), (96, 96), (96, 112), (128, 128))  # height and width that clips are drawn at
LENGTH = 9  # frames of a clip, from which one is taken
VISIBLE = ("colour", "shape", "background")  # the attributes that one frame shows
LONGEST_BLUR = 9  # taps of the blur


def triple(scene: Scene) -> tuple[str, str, str]:
    """What a frame shows of a scene."""
    return scene.colour, scene.shape, scene.background


def never_shown(scene: Scene) -> bool:
    """True for what training never shows in any frame.

    A frame does not show the direction, so a held-out scene alone would be seen moving elsewhere. Where moving right
    is held out, colour, shape and background are kept out together: one combination of the three in five.
    """
    return Scene(scene.colour, scene.shape, "right", scene.background).held_out


@cache
def training_scenes() -> tuple[Scene, ...]:
    """All scenes that may be drawn: neither held out by the demo nor of a combination that is never shown."""
    return tuple(scene for scene in clips.scenes(held_out=False) if not never_shown(scene))


def variants(scene: Scene) -> list[Scene]:
    """All scenes that differ from this one in exactly one visible attribute, moving as it does."""
    words = {"colour": clips.COLOURS, "shape": clips.SHAPES, "background": clips.BACKGROUNDS}
    changed = itertools.chain.from_iterable(
        (Scene(**{**vars(scene), name: word}) for word in words[name] if word != getattr(scene, name))
        for name in VISIBLE
    )
    return [other for other in changed if other.colour != other.background]


def difference(scene: Scene, other: Scene) -> str:
    """The one visible attribute in which two scenes differ."""
    (name,) = (name for name in VISIBLE if getattr(scene, name) != getattr(other, name))
    return name


def draw(shown: list[Scene], size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random frame of a new clip of each scene: float [B, 3, height, width] in [0, 1]."""
    video = clips.render(shown, LENGTH, *size, generator)  # [B, 3, LENGTH, H, W] in [-1, 1]
    which = torch.randint(LENGTH, (len(shown),), generator=generator)
    return video[torch.arange(len(shown)), :, which] / 2 + 0.5


def blur(frames: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of each frame [B, 3, H, W] with its own sigma [B] in pixels; 0 leaves a frame as it is."""
    distance = torch.arange(LONGEST_BLUR) - LONGEST_BLUR // 2
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-2)[:, None]) ** 2)  # [B, taps]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # [3 B, taps]
    half = LONGEST_BLUR // 2
    flat = functional.pad(frames.flatten(0, 1)[None], (half,) * 4, mode="replicate")  # [1, 3 B, H', W']
    flat = functional.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return functional.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))[0].view_as(frames)


def spoil(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames as a poor video shows them: paler or darker, half of them blurred, half noisy; still in [0, 1]."""
    count = len(frames)
    pick = torch.rand(4, count, generator=generator)
    sigma = torch.where(pick[0] < 0.5, 2.5 * torch.rand(count, generator=generator), 0.0)
    noise = torch.where(pick[1] < 0.5, 0.15 * torch.rand(count, generator=generator), 0.0).view(-1, 1, 1, 1)
    contrast, brightness = (0.85 + 0.3 * pick[2]).view(-1, 1, 1, 1), (0.1 * pick[3] - 0.05).view(-1, 1, 1, 1)
    frames = (blur(frames, sigma) - 0.5) * contrast + 0.5 + brightness
    return (frames + noise * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
