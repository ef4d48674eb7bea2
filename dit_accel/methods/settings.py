"""Settings that several methods have, and the objective that comes with one of them."""

from __future__ import annotations

import dataclasses

from dit_accel.errors import DitAccelError
from dit_accel.method import MethodConfig, Objective
from dit_accel.order import TokenOrder
from dit_accel.plans.curves import Curve
from dit_accel.plans.gate import divergence, gate_of, gate_sample
from dit_accel.plans.plan import BLOCK_Q
from dit_accel.plans.routed import LARGEST_BLOCK, Ordering, cut
from dit_accel.plans.sharing import Share
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

GATE = Objective(
    "gate",
    trains="a gate",
    record=gate_sample,
    loss=divergence,
    part=gate_of,
    when=lambda config: config.score == "learned",
    needs="score=learned",
    alone=True,
    exclusive=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSettings(MethodConfig):
    """How a method cuts the visual tokens into blocks.

    Args:
        block: tokens a key block holds, at most 1024.
        block_q: tokens a query block holds, at most 1024; None: as many as a key block. Kernels of an H100 take 128.
        order: "raster": blocks are runs of tokens; "tile": 3-D tiles, chosen per grid; "morton" or "hilbert": runs
            along a curve.
    """

    block: int = option(64, least=1, most=LARGEST_BLOCK)
    block_q: int | None = option(BLOCK_Q, least=1, most=LARGEST_BLOCK)
    order: Ordering = "raster"

    @property
    def square_blocks(self) -> bool:
        return False

    def cut(self, grid: TokenGrid) -> tuple[TokenOrder, TokenOrder, Curve | None]:
        """`cut` by these settings."""
        return cut(self.order, grid, self.block_q or self.block, self.block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSettings(BlockSettings):
    """Settings of a method that may attend to single tokens besides its blocks.

    Args:
        extra_tokens: visual tokens outside its exact blocks that every query block attends to exactly: those with the
            highest logits for its mean query. They leave the tail. 0: none.
    """

    extra_tokens: int = option(0, least=0, ramps=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingSettings(MethodConfig):
    """Settings of a method whose layers may share results.

    Args:
        share: what a layer shares between denoising steps.
        refresh: for how many steps.

    Raises:
        DitAccelError: a value is out of range, or nothing is shared for more than one step.
    """

    share: Share = "none"
    refresh: int = option(1, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh > 1 and self.share == "none":
            raise DitAccelError(
                f"refresh={self.refresh} is how long a layer shares results; set share='residual' or 'output'."
            )
