"""Plans with anchors: tokens of a low-resolution copy of each frame, which a call carries besides its own tokens.

The anchors of a frame lie behind its last row, as further rows of the same width. So the sequence stays a raster, and
a mask stays a union of products of axes. A further row holds f rows of anchors: the anchor of row Y and column X lies
in further row ⌊Y / f⌋ and column f·X + Y mod f. A window of anchors is then a box in these rows too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.static import MaskPlan
from dit_accel.tokens import TokenGrid


class AnchoredPlan(MaskPlan):
    """A static plan of a call's own tokens and of anchors, each of which stands for about factor x factor tokens.

    Args:
        base: grid of the call's own tokens.
        rows, columns: which own rows and columns a row and a column see.
        factor: width over the width of the low-resolution frame. Its height is `factor` times a whole number, so that
            the anchors fill whole rows of the grid.
        reach: sides of the windows of anchors, a multiple of `factor`. An anchor sees its window, any other token the
            one that covers it.

    Attributes:
        grid: of the sequence with the anchors.
        low: height and width of the low-resolution frame.

    Raises:
        DitAccelError: the grid is lower than `factor` or its width no multiple of it.
    """

    def __init__(
        self, method: str, config: Any, base: TokenGrid, rows: AxisTable, columns: AxisTable, factor: int, reach: int
    ) -> None:
        if base.width % factor or base.height < factor:
            raise DitAccelError(
                f"{method} with factor={factor} takes a width in multiples of {factor} tokens and a height of at least "
                f"{factor}, got {base}. Choose such a size or another factor, or factor=0 for no anchors."
            )
        more = max(1, round(base.height / factor**2))
        self.base, self.factor, self.low = base, factor, (more * factor, base.width // factor)
        frames, none = AxisTable.full(base.frames), torch.zeros(more, dtype=torch.int64)
        windows = AxisTable(torch.cat((rows.start, none)), torch.cat((rows.stop, none)))
        at = torch.cat((torch.arange(base.height) * self.low[0] // base.height // factor, torch.arange(more)))
        down, across = (
            blocked(at, reach // factor, more),
            blocked(torch.arange(base.width), factor * reach, base.width),
        )
        anchors = AxisTable(down.start + base.height, down.stop + base.height)
        mask = Mask((Product(frames, windows, columns), Product(frames, anchors, across)))
        grid = dataclasses.replace(base, height=base.height + more)
        super().__init__(method, config, grid, mask, order="tile")

    @property
    def places(self) -> Tensor:
        """The own token whose position each anchor takes, the first that it stands for: int64 [anchors of a frame]."""
        (more, width), (height, _) = (self.grid.height - self.base.height, self.base.width), self.low
        row, column = torch.arange(more)[:, None], torch.arange(width)
        first = (row * self.factor + column % self.factor) * self.base.height // height
        return (first * width + column // self.factor * self.factor).flatten()

    def extend(self, latent: Tensor) -> Tensor:
        """A latent with its mean-pooled copy as further rows of patches: [..., H, W] to [..., H + more, W].

        Raises:
            DitAccelError: a side is no whole number of patches.
        """
        if latent.shape[-2] % self.base.height or latent.shape[-1] % self.base.width:
            raise DitAccelError(f"Anchors need a latent of whole patches, got {tuple(latent.shape)} for {self.base}.")
        patch_h, patch_w = latent.shape[-2] // self.base.height, latent.shape[-1] // self.base.width
        height, width = self.low
        low = torch.nn.functional.adaptive_avg_pool2d(latent.flatten(0, -3), (height * patch_h, width * patch_w))
        cells = low.reshape(len(low), -1, self.factor, patch_h, width, patch_w).permute(0, 1, 3, 4, 2, 5)
        return torch.cat((latent, cells.reshape(*latent.shape[:-2], -1, latent.shape[-1])), -2)


def blocked(position: Tensor, size: int, length: int) -> AxisTable:
    """Each position sees the run of `size` that it is in; the last one of an axis may be shorter."""
    start = position // size * size
    return AxisTable(start, (start + size).clamp(max=length))
