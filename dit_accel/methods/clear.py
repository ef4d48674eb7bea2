"""CLEAR: each query of an image sees the keys in a disc around it; text stays exact.

Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", arXiv:2412.16112. The
mask is that of the authors' code: dy² + dx² < r², cut off at the borders. Several frames, such as an image and one that
conditions it, see each other's discs: our extension.

With ``pool=4`` an image's queries also see, in the same softmax, one more key and value for each cell of 4 x 4 tokens:
the sum of the cell's keys and values after the rotary embedding, times learned weights [4, 4] of the layer, which start
at the mean. Text queries do not see them. This is the published ``_down_4``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import attend_blocks, gradients_follow, in_autocast_dtype
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.method import LearnedModule, Method, MethodConfig
from dit_accel.order import TokenOrder
from dit_accel.plans.masks import AxisTable, Mask, Product
from dit_accel.plans.plan import BLOCK_K, BLOCK_Q, PlanArguments
from dit_accel.plans.sampled import SampledQueries
from dit_accel.plans.static import MaskPlan
from dit_accel.tokens import TokenGrid
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of clear.

    Args:
        radius: r, in tokens; the published ones are 8, 16 and 32.
        pool: sides of the cells, each of which adds a key; 0: none. Height and width are multiples of it.
    """

    radius: int = option(16, least=1, ramps=True)
    pool: int = option(0, least=0)


def reach(radius: int, row: int) -> int:
    """The largest |dx| with row² + dx² < radius², for |row| < radius."""
    return math.isqrt(radius**2 - row**2 - 1)


def shifted(length: int, first: int, last: int) -> AxisTable:
    """Query i sees the keys i + first, ..., i + last that are on the axis."""
    position = torch.arange(length)
    return AxisTable((position + first).clamp(0, length), (position + last + 1).clamp(0, length))


def make_plan(grid: TokenGrid, config: Config) -> MaskPlan:
    """The disc as disjoint terms: one for each run of rows that reach equally far to both sides."""
    rows = range(max(1 - config.radius, 1 - grid.height), min(config.radius, grid.height))
    frames = AxisTable.full(grid.frames)
    terms = []
    for wide, run in itertools.groupby(rows, lambda row: min(reach(config.radius, row), grid.width - 1)):
        first, *rest = run
        last = rest[-1] if rest else first
        terms.append(Product(frames, shifted(grid.height, first, last), shifted(grid.width, -wide, wide)))
    mask = Mask(tuple(terms))
    return PooledPlan(config, grid, mask) if config.pool else MaskPlan("clear", config, grid, mask, order="tile")


class CellWeights(nn.Module):
    """The weights of the tokens of a cell in a layer, for all heads, keys and values alike: fp32 [pool, pool]."""

    def __init__(self, pool: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((pool, pool), 1 / pool**2))

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Visual tokens [..., visual, D] to cells [..., cells, D], row by row, in the dtype of x."""
        pool = self.weight.shape[0]
        cells = x.unflatten(-2, (grid.frames, grid.height // pool, pool, grid.width // pool, pool))
        wide = torch.promote_types(x.dtype, torch.float32)
        summed = torch.einsum("...trycxd,yx->...trcd", cells.to(wide), self.weight.to(x.device, wide))
        return summed.flatten(-4, -2).to(x.dtype)


class PooledPlan(MaskPlan):
    """The disc and the cells, in one softmax.

    Raises:
        DitAccelError: height or width is no multiple of the cells' sides.
    """

    config: Config

    def __init__(self, config: Config, grid: TokenGrid, mask: Mask) -> None:
        if grid.height % config.pool or grid.width % config.pool:
            raise DitAccelError(
                f"clear with pool={config.pool} takes a height and a width in multiples of {config.pool} tokens, got "
                f"{grid}. Choose such a size, or pool=0 without these weights."
            )
        super().__init__("clear", config, grid, mask, order="tile")
        self.cells = TokenGrid(grid.frames, grid.height // config.pool, grid.width // config.pool)

    @property
    def needs_whole(self) -> str | None:
        return "it pools the whole picture into cells"

    @functools.cached_property
    def pairs(self) -> int:
        """With the pairs of a visual query and a cell."""
        return super().pairs + self.grid.visual * self.cells.visual

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        ((part, (kernel, more)),) = super().calls(learned).items()
        return {part: (kernel, more | {"lse": True})}

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        """Without a module its weights count as they start."""
        module = call.module
        if module is None:
            module = CellWeights(self.config.pool).to(q.device).requires_grad_(False)
        if not isinstance(module, CellWeights):
            raise DitAccelError(f"clear takes CellWeights as its module, got {type(module).__name__}.")
        q, k, v = in_autocast_dtype(q, k, v)
        with torch.autocast(q.device.type, enabled=False):  # cells are summed in fp32
            return self._run(q, k, v, call, module)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments, module: CellWeights) -> Tensor:
        gradients = gradients_follow(q, k, v, *module.parameters())
        (chosen, lists), rows = self.chosen(q, call.impl, gradients=gradients, lse=True), self.grid.visual_rows
        how: dict[str, Any] = {"scale": call.scale, "lse": True, "impl": chosen.name}
        near, near_sums = attend_blocks(
            q, k, v, lists, self.geometry, Segments.of(q, call.text_lens), text_bias=call.text_bias, **how
        )
        keys, values = (module(x[:, :, rows], self.grid) for x in (k, v))
        far, far_sums = attend_blocks(q[:, :, rows], keys, values, *self._all_cells(q.device), **how)
        assert near_sums is not None and far_sums is not None
        share = (far_sums - near_sums[:, :, rows]).sigmoid()[..., None]
        visual = torch.lerp(near[:, :, rows].to(share.dtype), far.to(share.dtype), share).to(near.dtype)
        pieces = near[:, :, : rows.start], visual, near[:, :, rows.stop :]
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Softmax over the disc, and for visual queries over the cells."""
        module = CellWeights(self.config.pool).to(q)
        start = {"weight": weights[0] if weights else module.weight}
        keys, values = (
            torch.cat([x, torch.func.functional_call(module, start, (x[self.grid.visual_rows], self.grid))])
            for x in (k, v)
        )
        cells = call.are_visual.expand(-1, self.cells.visual)
        return masked_attention(q, keys, values, torch.cat([call.seen(head), cells], 1))

    def _all_cells(self, device: torch.device) -> tuple[BlockLists, Geometry]:
        """Every cell for every visual query, the queries in a row of their own."""
        orders = TokenOrder(TokenGrid(1, 1, self.grid.visual), BLOCK_Q), TokenOrder(self.cells, BLOCK_K)
        every = torch.arange(orders[1].blocks, dtype=torch.int32, device=device)
        return BlockLists.full(every.expand(orders[0].blocks, -1).contiguous()), Geometry.of_visual(*orders)


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The radius whose share of the visual pairs is nearest to what the density leaves for them."""
    wanted = grid.visual_share(density) * (grid.height * grid.width) ** 2

    def error(radius: int) -> float:
        """Distance of the disc's pairs from the wanted ones; a row distance y occurs height - |y| times."""
        pairs = 0
        for y in range(max(1 - radius, 1 - grid.height), min(radius, grid.height)):
            x = min(reach(radius, y), grid.width - 1)
            pairs += (grid.height - abs(y)) * (grid.width * (2 * x + 1) - x * (x + 1))
        return abs(pairs - wanted)

    return {"radius": min(range(1, math.isqrt(grid.height**2 + grid.width**2) + 2), key=error)}


METHOD = Method(
    "clear",
    Config,
    make_plan,
    "CLEAR: the keys in a disc around each query of an image",
    source="arXiv:2412.16112",
    good_for="large images",
    needs_training=True,
    module=LearnedModule(
        "cell_weights", lambda head_dim, heads, config: CellWeights(config.pool), when=lambda config: config.pool > 0
    ),
    at_density=at_density,
    sparsest=lambda grid: 1 / grid.visual if grid.frames == 1 else 1.0,  # radius 1: the query itself
)
