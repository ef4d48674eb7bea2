"""What a training run does: the model's size, its noise schedule, and the stages of its curriculum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers import WanPipeline

from tools.demo.model import SHIFT, build_pipeline

Grid = tuple[int, int, int, int]  # frames, height, width in pixels; clips a step


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: `steps` optimizer steps, on its grids in turn.

    The learning rate of AdamW goes from `start` to `end` along a half cosine.
    """

    name: str
    steps: int
    start: float
    end: float
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Recipe:
    """A run.

    Args:
        stages: the curriculum.
        shift: of the noise schedule at the default size.
        averaging: decay of the weights' moving average.
        model: keyword arguments of `build_pipeline`.
    """

    stages: tuple[Stage, ...]
    shift: float = SHIFT
    averaging: float = 0.998
    model: dict[str, Any] = field(default_factory=dict)

    def build(self) -> WanPipeline:
        """The pipeline before training."""
        return build_pipeline(**self.model, shift=self.shift)


DEMO = (
    Stage("small", 1150, 1.2e-3, 1.2e-3, ((9, 64, 64, 256), (17, 64, 64, 128), (9, 64, 128, 128), (9, 128, 64, 128))),
    Stage(
        "middle",
        1100,
        1.2e-3,
        9e-4,
        ((17, 96, 96, 64), (17, 64, 96, 96), (17, 128, 128, 32), (17, 96, 64, 96), (5, 96, 96, 192), (17, 96, 128, 48)),
    ),
    Stage(
        "default",
        1200,
        9e-4,
        3e-4,
        ((17, 192, 192, 16), (17, 128, 128, 32), (17, 160, 192, 20), (17, 224, 256, 8), (9, 96, 96, 128)),
    ),
    Stage(
        "large",
        848,
        3e-4,
        1e-5,
        ((17, 224, 256, 8), (17, 192, 192, 16), (17, 224, 256, 8), (17, 192, 192, 16), (9, 64, 64, 256)),
    ),
)

RECIPES = {
    "demo": Recipe(DEMO),
    "tiny": Recipe(
        (Stage("tiny", 20, 1e-3, 1e-4, ((5, 32, 32, 4), (5, 32, 48, 4))),),
        model={"dim": 64, "layers": 2, "ffn_dim": 64},
    ),
}
