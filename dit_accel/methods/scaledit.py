"""Scale-DiT (UltraGen): local windows of an image, and anchors from a low-resolution copy of it, in one attention.

Source: Zhang and Tai, "Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local Attention",
arXiv:2510.16325, and its code. As there:

- A token sees the text, the tokens of its window, and anchors: all of them if they are few, else the window of
  anchors that covers it. An anchor sees the text and its own window of anchors, and no other token.
- An anchor takes the position of the first token that it stands for (`scale_PE`).

Choices where paper and code differ or a wrapper cannot follow:

- Anchors are the mean-pooled latent of the call itself, with the call's timestep. In the code they are the finished
  latent of a low-resolution pass, at timestep 0. So no second pass is needed, and early steps know less of the whole.
- Text sees the anchors, as with the code's `text_attend_scale="all"`.
- Windows of anchors are squares of 16 x 16; in the code, 256 anchors in window order. There are as many pairs.
- Heights that are no multiple of factor² get the nearest number of anchors that fills whole rows.
- In a video, windows span all frames and each frame has its anchors: our extension.
- The LoRA acts on all tokens. In the code, parts of it act on anchors alone.
"""

from __future__ import annotations

import dataclasses

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import Method, MethodConfig
from dit_accel.plans.anchored import AnchoredPlan, blocked
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.static import MaskPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of scaledit.

    Args:
        window: sides of the windows in tokens.
        sliding: each token is in the middle of its window, of 2 ⌊window / 2⌋ + 1 tokens a side and cut off at the
            borders, as in the code's training. Otherwise windows divide the image.
        factor: side of the image over the side of its low-resolution copy; 0: no anchors.
        reach: sides of the windows of anchors, a multiple of `factor`.

    Raises:
        DitAccelError: `reach` is no multiple of `factor`.
    """

    window: int = option(16, least=1)
    sliding: bool = False
    factor: int = option(4, least=0)
    reach: int = option(16, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor and self.reach % self.factor:
            raise DitAccelError(f"scaledit needs reach as a multiple of factor={self.factor}, got {self.reach}.")

    @property
    def anchors(self) -> bool:
        """Whether calls carry anchors."""
        return self.factor > 0


def make_plan(grid: TokenGrid, config: Config) -> MaskPlan:
    """The plan; with anchors its own grid is that of the longer sequence."""

    def axis(length: int) -> AxisTable:
        half = config.window // 2
        position = torch.arange(length)
        if config.sliding:
            return AxisTable((position - half).clamp(min=0), (position + half + 1).clamp(max=length))
        return blocked(position, config.window, length)

    rows, columns = axis(grid.height), axis(grid.width)
    if config.anchors:
        return AnchoredPlan("scaledit", config, grid, rows, columns, config.factor, config.reach)
    return MaskPlan(
        "scaledit", config, grid, Mask((Product(AxisTable.full(grid.frames), rows, columns),)), order="tile"
    )


METHOD = Method(
    "scaledit",
    Config,
    make_plan,
    "Scale-DiT: windows of an image and anchors from its low-resolution copy",
    source="arXiv:2510.16325",
    good_for="very large images of FLUX",
    needs_training=True,
    experimental=True,
)
