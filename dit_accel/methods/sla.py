"""Sparse-linear attention (SLA): the best key blocks exactly, the rest through a learned linear branch.

Source: "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention" (arXiv 2509.24006) and
its code, thu-ml/SLA. Scope "all" is what the published code computes, scope "marginal" what the paper's equations say:
critical blocks exactly, the lowest dropped, the rest linear. Weights trained with one scope do not fit the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.impls import Impl
from dit_accel.kernels.sla.api import choose_impl, route, sparse_linear_attention
from dit_accel.kernels.sla.features import EPSILON, FEATURE_MAPS, FeatureMap, apply_map
from dit_accel.kernels.sla.reference import block_map
from dit_accel.kernels.sla.setting import LINEAR_SCOPES, LinearScope
from dit_accel.order import TokenOrder, cut_blocks, valid_tokens
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.definition import Definition, masked_attention
from dit_accel.plans.plan import Plan, among_others, building
from dit_accel.plans.tiles import tile_shapes
from dit_accel.registry import LearnedModule, Method
from dit_accel.tokens import TokenGrid

# Shares such as 0.7 + 0.3 do not always add up to 1 in binary.
_ROUNDING = 1e-9
LARGEST_BLOCK = 1024  # every block is computed whole, padding included


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of SLA; the defaults are the published ones.

    Args:
        topk: share of the visual key blocks that every query block attends to exactly, in (0, 1]. Of K blocks that is
            ``max(1, int(topk * K))``: rounded down as published, but never less than one.
        skip: share dropped altogether, in [0, 1); ``int(skip * K)`` blocks. It counts in scope "marginal" only.
        feature_map: of the linear branch: "softmax" over the head dimension, "elu" plus one, or "relu".
        linear_scope: "all": linear attention over all visual keys; "marginal": over blocks neither kept nor dropped.
        block: tokens a query block and a key block hold, at most 1024.
        order: "raster": blocks are runs of tokens; "tile": 3-D tiles, chosen per grid.

    Raises:
        DitAccelError: a value is out of range, or topk and skip together are more than 1 (a `skip` left at its default
            is not held against `topk` in scope "all", which has no use for it).
    """

    topk: float = 0.05
    skip: float = 0.10
    feature_map: FeatureMap = "softmax"
    linear_scope: LinearScope = "all"
    block: int = 64
    order: Literal["raster", "tile"] = "raster"

    def __post_init__(self) -> None:
        if not _is_number(self.topk) or not 0 < self.topk <= 1:
            raise DitAccelError(f"topk is the share of key blocks to keep, above 0 and at most 1; got {self.topk!r}.")
        if not _is_number(self.skip) or not 0 <= self.skip < 1:
            raise DitAccelError(f"skip is the share of key blocks to drop, at least 0 and below 1; got {self.skip!r}.")
        for name, known in (
            ("feature_map", FEATURE_MAPS),
            ("linear_scope", LINEAR_SCOPES),
            ("order", ("raster", "tile")),
        ):
            if getattr(self, name) not in known:
                raise DitAccelError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if not isinstance(self.block, int) or isinstance(self.block, bool) or not 1 <= self.block <= LARGEST_BLOCK:
            raise DitAccelError(f"block is a number of tokens from 1 to {LARGEST_BLOCK}; got {self.block!r}.")
        default = type(self).__dataclass_fields__["skip"].default
        if self.topk + self.skip > 1 + _ROUNDING and (self.linear_scope == "marginal" or self.skip != default):
            raise DitAccelError(
                f"topk and skip are shares of the same blocks and cannot exceed 1 together; got {self.topk} and "
                f"{self.skip}. Lower one of them."
            )

    def kept(self, blocks: int) -> int:
        """Visual key blocks that each of `blocks` query blocks keeps."""
        return max(1, int(self.topk * blocks))

    def dropped(self, blocks: int) -> int:
        """Visual key blocks that each of `blocks` query blocks drops; 0 in scope "all"."""
        if self.linear_scope == "all":
            return 0
        return min(int(self.skip * blocks), blocks - self.kept(blocks))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Routing(NamedTuple):
    """How one call treats its blocks: three `BlockMask`s with leading dimensions [B, H].

    critical: attended exactly; conditioning and text rows and columns are always here.
    skipped: dropped; empty in scope "all".
    linear: visual blocks of the linear branch; in scope "all" every one, the critical ones too.
    """

    critical: BlockMask
    skipped: BlockMask
    linear: BlockMask


class Projection(nn.Module):
    """A head_dim x head_dim linear layer whose weights a kernel applies: calling it gives them.

    It is a module and is called, so that whoever moves or gathers weights around a module's call (offloading, FSDP)
    reaches these; and no `nn.Linear`, so that casting and adapters for linear layers leave it alone.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.in_features = head_dim
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))

    def forward(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias on `device`: views, which stay valid when the parameters are moved after the call."""
        return self.weight.view_as(self.weight).to(device), self.bias.view_as(self.bias).to(device)


class SparseLinearAttention(nn.Module):
    """SLA with its learned projection, one head_dim x head_dim linear layer shared by all heads.

    The projection starts at zero, so that an untrained module is plain top-k block-sparse attention. It is kept in fp32
    and cast to the input's dtype at use.

    Args:
        head_dim: D.
        config: settings of `Config`, by name.

    Example:
        >>> attention = SparseLinearAttention(64, topk=0.1)
        >>> q, k, v = torch.randn(3, 1, 4, 1000, 64)
        >>> attention(q, k, v).shape
        torch.Size([1, 4, 1000, 64])
    """

    def __init__(self, head_dim: int, **config: Any) -> None:
        super().__init__()
        self.config = Config(**config)
        self.proj = Projection(head_dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: TokenGrid | None = None,
        text_lens: torch.Tensor | None = None,
        scale: float | None = None,
        impl: Impl = "auto",
    ) -> torch.Tensor:
        """Attend.

        Args:
            q, k, v: [B, H, N, D], any strides; D is the module's head_dim.
            grid: where the tokens lie; None: all visual, in one row.
            text_lens: int [B], valid text tokens of each sample. None: all of them.
            scale: factor of the logits; D ** -0.5 if None.
            impl: "auto", "reference", "portable" or "triton"; a named one runs or raises.

        Returns:
            [B, H, N, D] in the dtype of q, laid out as [B, N, H, D] in memory.

        Raises:
            DitAccelError: shapes do not fit the grid or head_dim, tiles are asked for without a grid, or `impl` cannot
                run here.
        """
        if q.shape[-1] != self.proj.in_features:
            raise DitAccelError(
                f"This module was built for head_dim {self.proj.in_features}, the call has {q.shape[-1]}; "
                "build SparseLinearAttention with the model's head_dim."
            )
        order = _order(self.config, self._grid(q, grid))
        weight, bias = self.proj(q.device)
        return _attend(self.config, order, q, k, v, weight, bias, scale=scale, text_len=text_lens, impl=impl)

    @torch.no_grad()
    def route(self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid | None = None) -> Routing:
        """Which blocks a call with these queries and keys keeps, drops and treats linearly.

        Args:
            q, k: [B, H, N, D].
            grid: as for `forward`.

        Raises:
            DitAccelError: shapes do not fit the grid, or tiles are asked for without one.
        """
        order = _order(self.config, self._grid(q, grid))
        if q.shape != k.shape or q.ndim != 4 or q.shape[2] != order.grid.tokens:
            raise DitAccelError(
                f"q and k must be [batch, heads, {order.grid.tokens}, head_dim], both alike, for the grid "
                f"{order.grid}; got {tuple(q.shape)} and {tuple(k.shape)}."
            )
        blocks = order.visual_blocks
        kept, dropped = route(q, k, order, self.config.kept(blocks), self.config.dropped(blocks))
        none = torch.zeros((*kept.shape[:2], blocks, blocks), dtype=torch.bool, device=q.device)
        critical, skipped = none.scatter(-1, kept.long(), True), none.scatter(-1, dropped.long(), True)
        linear = ~none if self.config.linear_scope == "all" else ~(critical | skipped)
        return Routing(
            critical=_block_mask(critical, order, dense=True),
            skipped=_block_mask(skipped, order, dense=False),
            linear=_block_mask(linear, order, dense=False),
        )

    def _grid(self, q: torch.Tensor, grid: TokenGrid | None) -> TokenGrid:
        if grid is not None:
            return grid
        if self.config.order == "tile":
            raise DitAccelError("order='tile' needs to know where the tokens lie; pass grid=TokenGrid(...).")
        return TokenGrid(1, 1, q.shape[-2])

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self.config, field.name)!r}" for field in dataclasses.fields(Config))


class SlaPlan(Plan):
    """SLA on one grid. Which blocks a query keeps depends on the call; how many does not.

    Attributes:
        order: how queries and keys are cut into blocks.
    """

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("sla", config, grid)
        self.order = _order(config, grid)

    @property
    def visited(self) -> int:
        """Blocks attended exactly in every head of every call, conditioning and text blocks included."""
        rows, around = self.order.visual_blocks, self.order.dense_blocks
        return rows * (self.config.kept(rows) + around) + around * self.order.blocks

    @property
    def total(self) -> int:
        """Blocks that dense attention visits."""
        return self.order.blocks**2

    @property
    @building()
    def pairs(self) -> int:
        """Pairs attended exactly, text included; the linear branch counts none.

        Every query keeps the same number of key blocks, so the number is the same for every head of every call if all
        visual blocks hold the same number of tokens. Where some hold fewer (the tail of raster order, tiles cut off
        by the border), it is the number for the fullest blocks: no call attends more, and a query that keeps a smaller
        block attends fewer.
        """
        sizes = valid_tokens(self.order).sort(descending=True).values
        keys = int(sizes[: self.config.kept(self.order.visual_blocks)].sum())
        around = self.grid.tokens - self.grid.visual
        return self.grid.visual * (keys + around) + around * self.grid.tokens

    @property
    @building()
    def partial_blocks(self) -> int:
        return cut_blocks(self.order)

    @property
    def routes(self) -> bool:
        return True

    def kept_keys(self, queries: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The critical ones; the linear branch keeps none exactly."""
        count = self.order.visual_blocks
        kept, _ = route(q, k, self.order, self.config.kept(count), self.config.dropped(count))
        critical = torch.zeros(count, count, dtype=torch.bool, device=q.device).scatter(-1, kept[0, 0].long(), True)
        with building():
            slots = self.order.index()[: count * self.order.block] - self.grid.visual_start
        slots = slots.to(q.device)
        inside = slots >= 0
        block = torch.empty(self.grid.visual, dtype=torch.int64, device=q.device)
        block[slots[inside]] = inside.nonzero()[:, 0] // self.order.block
        return among_others(critical[block[queries]][:, block], self.grid)

    def token_mask(self) -> torch.Tensor:
        raise DitAccelError(
            "sla has no token mask that is known before the call: it routes by content. "
            "SparseLinearAttention.route(q, k) gives the blocks of one call, pairs and density their number."
        )

    def block_mask(self, *args: Any, **kwargs: Any) -> BlockMask:
        raise DitAccelError(
            "sla has no block mask that is known before the call: it routes by content. "
            "SparseLinearAttention.route(q, k) gives the blocks of one call, visited, total and density their number."
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        text_lens: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
        impl: Impl = "auto",
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """Without a module the projection is zero, and the linear branch is left out."""
        if module is not None and not isinstance(module, SparseLinearAttention):
            raise DitAccelError(f"sla takes a SparseLinearAttention as its module, got {type(module).__name__}.")
        weight, bias = (None, None) if module is None else module.proj(q.device)
        call = {"scale": scale, "text_len": text_lens, "text_bias": text_bias, "impl": impl}
        return _attend(self.config, self.order, q, k, v, weight, bias, **call)

    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = "auto", *, learned: bool = False
    ) -> tuple[str, str]:
        scope = self.config.linear_scope if learned else None
        chosen, why = choose_impl(device, dtype, head_dim, self.order, scope, impl)
        return chosen.name, why


def _attend(
    config: Config,
    order: TokenOrder,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    **call: Any,
) -> torch.Tensor:
    grid = order.grid
    return sparse_linear_attention(
        q,
        k,
        v,
        critical=config.kept(order.visual_blocks),
        skipped=config.dropped(order.visual_blocks),
        block=order.block,
        grid=grid.shape,
        tile=order.tile,
        conditioning=grid.conditioning,
        text=grid.text,
        text_first=grid.text_first,
        feature_map=config.feature_map,
        linear_scope=config.linear_scope,
        weight=weight,
        bias=bias,
        **call,
    )


def _order(config: Config, grid: TokenGrid) -> TokenOrder:
    tile = choose_tile(config.block, grid) if config.order == "tile" else None
    return TokenOrder(grid, config.block, tile)


def choose_tile(block: int, grid: TokenGrid) -> tuple[int, int, int]:
    """The most compact tile of `block` tokens whose padding costs little.

    Routing works on averages, so a tile's tokens should be near each other: of the shapes that cut the grid into at
    most an eighth more blocks than the best does, the one with the smallest sum of sides, long rows first.
    """

    def blocks(tile: tuple[int, int, int]) -> int:
        return TokenOrder(grid, block, tile).visual_blocks

    shapes = tile_shapes(block, grid.shape)
    fewest = min(blocks(tile) for tile in shapes)
    near = [tile for tile in shapes if 8 * blocks(tile) <= 9 * fewest]
    return min(near, key=lambda tile: (sum(tile), -tile[2], -tile[1]))


def _block_mask(visual: torch.Tensor, order: TokenOrder, *, dense: bool) -> BlockMask:
    """A map [B, H, visual_blocks, visual_blocks] as lists; `dense`: conditioning and text blocks are listed too."""
    around = order.dense_blocks
    listed = F.pad(visual, (0, around, 0, around), value=dense)
    counts = listed.sum(-1, dtype=torch.int32)
    width = max(int(counts.max()), 1)
    positions = torch.arange(order.blocks, dtype=torch.int32, device=visual.device)
    indices = torch.where(listed, positions, order.blocks).sort(dim=-1).values[..., :width]
    indices = torch.where(indices < order.blocks, indices, 0)
    return BlockMask(indices, counts, torch.zeros_like(indices, dtype=torch.bool), order, order)


class SlaDefinition(Definition):
    """SLA for some queries: softmax over their critical blocks plus the projected linear branch over the linear ones.

    Which blocks these are is what the router says of this call; `flaw` checks it by itself.
    """

    plan: SlaPlan

    def __init__(self, plan: SlaPlan, rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, impl: Impl) -> None:
        super().__init__(plan, rows, q, k, impl)
        order, config = plan.order, plan.config
        self.blocks = order.visual_blocks
        lists = route(q, k, order, config.kept(self.blocks), config.dropped(self.blocks), impl)
        self.critical, self.skipped = (block_map(part, order)[0] for part in lists)  # [H, blocks, blocks]
        tokens = order.index()
        slots = (tokens >= 0).nonzero().squeeze(1)
        block_of = torch.empty(order.grid.tokens, dtype=torch.int64)
        block_of[tokens[slots]] = slots // order.block
        self.block_of = block_of.to(q.device)
        self.block = self.block_of[rows].clamp(max=self.blocks - 1)
        self.visual = (self.block_of[rows] < self.blocks)[:, None]

    def flaw(self) -> str | None:
        """A kept block with a lower score than one left out, by fp64 means and products, for some blocks of queries."""
        order = self.plan.order
        some = torch.linspace(0, self.blocks - 1, min(16, self.blocks)).long().to(self.q.device)
        index = order.index()[: self.blocks * order.block].to(self.q.device)
        held = (index >= 0).view(self.blocks, order.block, 1)

        def means(x: torch.Tensor) -> torch.Tensor:
            sums = (x.double()[index.clamp(min=0)].view(self.blocks, order.block, -1) * held).sum(1)
            return sums / held.sum(1)

        depth = order.block + self.q.shape[-1]  # terms of a mean and of a product
        for head, critical in enumerate(self.critical):
            query, key = means(self.q[0, head])[some], means(self.k[0, head])
            scores, kept = query @ key.T, critical[some]
            slack = depth * torch.finfo(torch.float32).eps * (query.abs() @ key.abs().T).amax(-1)
            worst = scores.masked_fill(~kept, torch.inf).amin(-1)
            best = scores.masked_fill(kept, -torch.inf).amax(-1)
            if not bool((worst >= best - slack).all()):
                return f"router: head {head} kept a block although a better one was left out"
        return None

    def seen(self, head: int) -> torch.Tensor:
        critical = F.pad(self.critical[head, self.block], (0, self.plan.order.dense_blocks), value=True)
        return critical[:, self.block_of] | ~self.visual

    def attend(
        self,
        head: int,
        seen: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        out = masked_attention(q, k, v, seen)
        if not weights:
            return out
        config = self.plan.config
        linear = ~(self.critical | self.skipped)[head, self.block]
        if config.linear_scope == "all":
            linear = torch.ones_like(linear)
        pairs = F.pad(linear, (0, self.plan.order.dense_blocks), value=False)[:, self.block_of]
        affinity = apply_map(q, config.feature_map) @ apply_map(k, config.feature_map).T * pairs
        branch = (affinity @ v) / (affinity.sum(-1, keepdim=True) + EPSILON)
        return torch.where(self.visual, out + F.linear(branch, *weights), out)


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The share of visual blocks, to six digits."""
    return {"topk": min(1.0, max(1e-6, float(f"{grid.visual_share(density):.6g}")))}


METHOD = Method(
    name="sla",
    config=Config,
    plan=lambda grid, config: SlaPlan(config, grid),
    module=LearnedModule(
        attribute="sparse_linear",
        make=lambda head_dim, config: SparseLinearAttention(head_dim, **dataclasses.asdict(config)),
    ),
    summary="top-k key blocks exactly, a learned linear branch for the rest (needs fine-tuning)",
    source="SLA, arXiv 2509.24006; github.com/thu-ml/SLA",
    at_density=at_density,
    definition=SlaDefinition,
)
