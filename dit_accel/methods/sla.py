"""Sparse-linear attention (SLA): critical key blocks exactly, the others through a learned linear branch.

Source: "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention" (arXiv 2509.24006) and
its code, thu-ml/SLA. In scope "all" the linear branch covers all blocks, as in the published code. In scope "marginal"
it covers the marginal blocks, as in the paper's equation 5. Weights trained with one scope do not fit the other. Score
"learned" ranks blocks by a trained gate (`plans/gate.py`) in place of block means.

With `topk=0` nothing is critical: visual tokens meet through linear attention alone, and text stays exact. This is how
LiT (arXiv 2501.12976) converts a trained model, which keeps its weights: its guidelines 3 and 4. Its depthwise
convolution (1) and fewer heads (2) change the architecture and are left out.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.kernels.router.api import classify, single_blocks
from dit_accel.kernels.sla.api import sparse_linear_attention
from dit_accel.kernels.sla.arguments import FeatureMap, LinearScope, SlaArguments, apply_map, learned_inputs
from dit_accel.kernels.sla.reference import block_map, linear_branch
from dit_accel.method import LearnedModule, Method, Objective
from dit_accel.methods.settings import GATE, BlockSettings
from dit_accel.plans.blocks import BlockMask, from_map
from dit_accel.plans.gate import BlockGate, gate_of, gated, pool
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.routed import GATED, LARGEST_BLOCK, RoutedPlan
from dit_accel.plans.sampled import SampledQueries, pooled
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

if TYPE_CHECKING:
    from dit_accel.hooks.selfcheck import ComputedAttention

LEARNED_MAP: FeatureMap = "hedgehog"
IMITATED = 64  # queries of a head whose weights the objective imitation compares
# Shares such as 0.7 + 0.3 do not always add up to 1 in binary.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Config(BlockSettings):
    """Settings of SLA; the defaults are the published ones.

    Args:
        topk: share of the visual key blocks that are critical for a query block, in [0, 1]. Of K blocks these are
            ``max(1, int(topk * K))``: rounded down as published, but at least one. 0: none.
        skip: share that is negligible, in [0, 1): ``int(skip * K)`` blocks. Scope "all" has no negligible blocks.
        feature_map: of the linear branch: "softmax" over the head dimension, "elu" plus one, "relu", "focused"
            (FLatten) or "hedgehog", which is learned; see `kernels.sla.arguments.apply_map`.
        linear_scope: "all": linear attention over all visual keys; "marginal": over those in marginal blocks.
        block_q: as many as a key block by default; TurboDiffusion's are 128 beside a `block` of 64.
        score: "mean": of block means; "learned": of a gate, which equals "mean" until it is trained.

    Raises:
        DitAccelError: topk and skip together exceed 1. Scope "all" does not read `skip`: its default is not counted.
    """

    topk: float = option(0.05, least=0, most=1, ramps=True)
    skip: float = option(0.10, least=0, below=1)
    feature_map: FeatureMap = "softmax"
    linear_scope: LinearScope = "all"
    block_q: int | None = option(None, least=1, most=LARGEST_BLOCK)
    order: Literal["raster", "tile"] = "raster"
    score: Literal["mean", "learned"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        default = type(self).__dataclass_fields__["skip"].default
        if self.topk + self.skip > 1 + _ROUNDING and (self.linear_scope == "marginal" or self.skip != default):
            raise DitAccelError(
                f"topk and skip are shares of the same blocks and cannot exceed 1 together; got {self.topk} and "
                f"{self.skip}. Lower one of them."
            )

    def counts(self, blocks: int) -> BlockCounts:
        """Critical and negligible blocks of every query block, of `blocks` visual key blocks."""
        topk = max(1, int(self.topk * blocks)) if self.topk else 0
        return BlockCounts(topk, 0 if self.linear_scope == "all" else min(int(self.skip * blocks), blocks - topk))


class BlockCounts(NamedTuple):
    """Numbers of critical (topk) and negligible (skip) key blocks of a query block."""

    topk: int
    skip: int


class Routing(NamedTuple):
    """The blocks of one call by class: three `BlockMask`s with leading dimensions [B, H]. Every visual block is in one.

    critical: attended exactly; also holds the conditioning and text rows and columns.
    marginal: covered by the linear branch alone. In scope "all" that branch covers the critical blocks too.
    negligible: not attended; empty in scope "all".
    """

    critical: BlockMask
    marginal: BlockMask
    negligible: BlockMask


class Projection(nn.Module):
    """Linear layers whose weights a kernel applies; a call returns them.

    A module that is called, so offloading and FSDP, which move or gather weights around a module's call, reach them.
    It is not an `nn.Linear`, so casting and adapters for linear layers leave it alone. The weights start at `weight`,
    float32 [..., out, in]; the bias starts at zero.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.shape[:-1], dtype=torch.float32))

    def forward(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias on `device`, as views that stay valid when the parameters move after the call."""
        return self.weight.view_as(self.weight).to(device), self.bias.view_as(self.bias).to(device)


class SparseLinearAttention(nn.Module):
    """SLA with its learned projection, one head_dim x head_dim linear layer shared by all heads.

    The projection starts at zero, so an untrained module computes plain top-k block-sparse attention. With `topk=0` it
    starts at the identity, and an untrained module computes plain linear attention. Hedgehog's map has a linear layer
    for the queries and one for the keys of each head, which start at the identity, as published. All weights stay in
    fp32; the projection is cast to the input's dtype at use.

    It takes D, the layer's heads, which the learned map and the gate tell apart, and settings of `Config` by name.

    Example:
        >>> attention = SparseLinearAttention(64, topk=0.1)
        >>> q, k, v = torch.randn(3, 1, 4, 1000, 64)
        >>> attention(q, k, v).shape
        torch.Size([1, 4, 1000, 64])
    """

    def __init__(self, head_dim: int, heads: int = 1, **config: Any) -> None:
        super().__init__()
        self.config, identity = Config(**config), torch.eye(head_dim, dtype=torch.float32)
        self.proj = Projection(torch.zeros_like(identity) if self.config.topk else identity.clone())
        learned = self.config.feature_map == LEARNED_MAP
        self.features = Projection(identity.repeat(2, heads, 1, 1)) if learned else None
        self.gate = BlockGate(head_dim, heads) if self.config.score == "learned" else None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: TokenGrid | None = None,
        text_lens: torch.Tensor | None = None,
        scale: float | None = None,
        impl: Impl = AUTO,
    ) -> torch.Tensor:
        """Attend; tensors, other arguments and errors as of `plans.plan.attention`.

        Args:
            grid: where the tokens lie; None: all visual, in one row, which tiles refuse.
        """
        if q.shape[-1] != self.proj.weight.shape[-1]:
            raise DitAccelError(
                f"This module was built for head_dim {self.proj.weight.shape[-1]}, the call has {q.shape[-1]}; "
                "build SparseLinearAttention with the model's head_dim."
            )
        plan = SlaPlan(self.config, self._grid(q, grid))
        return plan.attend(q, k, v, scale=scale, text_lens=text_lens, impl=impl, module=self)

    @torch.no_grad()
    def route(self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid | None = None) -> Routing:
        """The critical, marginal and negligible blocks of a call with q and k [B, H, N, D]; `grid` as for `forward`.

        Raises:
            DitAccelError: shapes do not fit the grid, or tiles are asked for without one.
        """
        plan = SlaPlan(self.config, self._grid(q, grid))
        orders, sequence = (plan.query_order, plan.key_order), plan.grid
        if q.shape != k.shape or q.ndim != 4 or q.shape[2] != sequence.tokens:
            raise DitAccelError(
                f"q and k must be [batch, heads, {sequence.tokens}, head_dim], both alike, for the grid "
                f"{sequence}; got {tuple(q.shape)} and {tuple(k.shape)}."
            )
        critical, negligible = (
            block_map(lists, plan.key_order) for lists in plan.classify(q, k, PlanArguments(module=self))
        )
        return Routing(
            critical=from_map(critical, *orders),
            marginal=from_map(~(critical | negligible), *orders, dense=False),
            negligible=from_map(negligible, *orders, dense=False),
        )

    def map_of(self, q: torch.Tensor, heads: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of the learned map for the heads of q; None without one. `heads` is as in `PlanArguments`."""
        if self.features is None:
            return None
        weight, bias = self.features(q.device)
        these = slice(0, None) if heads is None or weight.shape[1] == 1 else slice(heads[0], heads[0] + q.shape[1])
        return weight[:, these], bias[:, these]

    def _grid(self, q: torch.Tensor, grid: TokenGrid | None) -> TokenGrid:
        if grid is not None:
            return grid
        if self.config.order == "tile":
            raise DitAccelError("order='tile' needs the grid of the tokens; pass grid=TokenGrid(...).")
        return TokenGrid(1, 1, q.shape[-2])


class SlaPlan(RoutedPlan):
    """SLA on one grid. The critical blocks of a query depend on the call; their number does not."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("sla", config, grid, *config.cut(grid))

    @property
    def visited(self) -> int:
        """Blocks attended exactly in every head of every call, conditioning and text blocks included."""
        queries, keys = self.query_order, self.key_order
        listed = self.config.counts(keys.visual_blocks).topk + keys.dense_blocks
        return queries.visual_blocks * listed + queries.dense_blocks * keys.blocks

    @property
    def pairs(self) -> int:
        """As of `RoutedPlan.bound`; the linear branch counts none."""
        return self.bound(self.config.counts(self.key_order.visual_blocks).topk)

    @torch.no_grad()
    def classify(self, q: torch.Tensor, k: torch.Tensor, call: PlanArguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Critical and negligible blocks of every visual query block: int32 [B, H, blocks, *], ascending."""
        topk, skip = self.config.counts(self.key_order.visual_blocks)
        orders = self.query_order, self.key_order
        if self.config.score == "learned":
            q, k = gated(q, k, orders, call)
            orders = single_blocks(q), single_blocks(k)
        return classify(q, k, *orders, topk, skip, call.impl)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: PlanArguments) -> BlockLists:
        return BlockLists.full(self.classify(q, k, call)[0])

    def attend_visual(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments
    ) -> tuple[torch.Tensor, BlockLists]:
        """Without a module its weights count as they start."""
        module, config = call.module, self.config
        if call.scale is not None and not call.scale > 0:
            raise DitAccelError(f"sla ranks blocks by logits whose scale is above 0; got {call.scale}.")
        if module is None and config.topk:
            return super().attend_visual(q, k, v, call)
        if module is None:
            module = self.untrained(q)
        if not isinstance(module, SparseLinearAttention):
            raise DitAccelError(f"sla takes a SparseLinearAttention as its module, got {type(module).__name__}.")
        topk, skip = config.counts(self.key_order.visual_blocks)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        weight, bias = module.proj(q.device)
        settings = SlaArguments(
            weight, bias, self.query_order, self.key_order, topk, scale, skip, call.text_lens, call.text_bias,
            config.feature_map, module.map_of(q, call.heads), config.linear_scope, call.impl,
            self.classify(q, k, call) if config.score == "learned" else None,
        )  # fmt: skip
        out, critical = sparse_linear_attention(q, k, v, settings)
        return out, BlockLists.full(critical)

    def reference(
        self, call: SampledQueries, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """Softmax over critical blocks plus the projected linear branch."""
        config, seen = self.config, call.seen(head)
        out = masked_attention(q, k, v, seen)
        if not weights:
            if config.topk:
                return out
            weights = tuple(weight.to(q) for weight in self.untrained(q).parameters())
        pairs, rows = torch.zeros_like(seen), call.blocks(self.block_of(self.query_order))
        linear = call.once("linear", lambda: self._linear_blocks(call))[head, rows]
        pairs[:, self.grid.visual_rows] = linear[:, self.block_of(self.key_order).to(q.device)]
        features = None
        if config.feature_map == LEARNED_MAP:
            weight, bias = weights[2:4]
            row = min(head, weight.shape[1] - 1)  # heads may share the map
            features = weight[:, row : row + 1], bias[:, row : row + 1]
        inputs = q[None, None], k[None, None], v[None, None], pairs[None, None]
        branch = linear_branch(*inputs, weights[0], weights[1], config.feature_map, features)[0, 0]
        return torch.where(call.are_visual, out + branch, out)

    def _linear_blocks(self, call: SampledQueries) -> torch.Tensor:
        """The blocks of a call's linear branch: bool [H, query blocks, key blocks]."""
        critical, negligible = (
            block_map(lists, self.key_order)[0]
            for lists in self.classify(call.q, call.k, PlanArguments(impl=call.impl, module=call.module))
        )
        if self.config.linear_scope == "all":
            return torch.ones_like(critical)
        return ~(critical | negligible)

    def misrouted(self, call: SampledQueries) -> str | None:
        """A critical block with a lower score than another block, in fp64, among some blocks of queries."""
        queries, keys = self.query_order, self.key_order
        rows, columns = self.block_of(queries), self.block_of(keys)
        blocks = queries.visual_blocks
        some = torch.linspace(0, blocks - 1, min(16, blocks)).long().to(call.q.device)
        # terms of a mean and of a product, and of both sides of a gate
        gate = gate_of(call.module)
        depth = max(queries.block, keys.block) + call.q.shape[-1] * (1 if gate is None else 5)
        for head in range(call.q.shape[1]):
            assert call.lists is not None
            query = pooled(call.q[0, head].double(), queries, rows)[0][some]
            key, _ = pooled(call.k[0, head].double(), keys, columns)
            sizes, critical = (query.abs(), key.abs()), self.listed(call.lists, head)[some]
            if self.config.score == "learned" and gate is not None:
                key = pool(call.q, call.k.double(), queries, keys)[1][0, head]
                weights = gate.queries[head].double(), gate.keys[head].double()
                sizes = query.abs() @ weights[0].abs().T, key.abs() @ weights[1].abs().T
                query, key = query @ weights[0].T, key @ weights[1].T
            scores = query @ key.T
            slack = depth * torch.finfo(torch.float32).eps * (sizes[0] @ sizes[1].T).amax(-1)
            worst = scores.masked_fill(~critical, torch.inf).amin(-1)
            best = scores.masked_fill(critical, -torch.inf).amax(-1)
            if not bool((worst >= best - slack).all()):
                return f"router: head {head} chose a critical block although another has a higher score"
        return None

    def untrained(self, like: torch.Tensor) -> SparseLinearAttention:
        """A module for tensors [..., D] like this one, as it starts."""
        module = SparseLinearAttention(like.shape[-1], **dataclasses.asdict(self.config))
        return module.to(like.device).requires_grad_(False)

    kernel = impls.SLA

    def routing(self) -> dict[str, Any] | None:
        gated = GATED if self.config.score == "learned" else {}
        return {"by_number": True} | gated if self.config.topk else None

    def needs(self, learned: bool) -> dict[str, Any]:
        config = self.config
        critical = config.counts(self.key_order.visual_blocks).topk
        linear = {"linear_scope": config.linear_scope, "feature_map": config.feature_map, "critical": critical}
        return linear if learned else {}


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The share of visual blocks, to six digits."""
    return {"topk": min(1.0, max(1e-6, float(f"{grid.visual_share(density):.6g}")))}


def imitated(call: ComputedAttention) -> torch.Tensor:
    """Cross-entropy of the linear attention weights against softmax attention's, in nats.

    Source: Hedgehog (arXiv:2402.04347), section 4. Both are weights of the student's own q and k, which get no
    gradient: only the learned map trains. The paper takes all queries; here `IMITATED` visual ones, evenly spaced,
    stand for them. The keys are all visual ones. As published, the denominator has no epsilon.
    """
    assert isinstance(call.module, SparseLinearAttention)
    features = call.module.map_of(call.q, call.heads)
    q, k = (visual_of(x, call.plan.grid).detach().float() for x in (call.q, call.k))
    rows = torch.linspace(0, q.shape[2] - 1, min(IMITATED, q.shape[2]), device=q.device).long()
    q, scale = q[:, :, rows], q.shape[-1] ** -0.5 if call.scale is None else call.scale
    softmax = (q @ k.mT * scale).softmax(-1)
    a, b = (apply_map(x, LEARNED_MAP) for x in learned_inputs(q, k, features))
    linear = (a @ b.mT).clamp_min(torch.finfo(torch.float32).tiny)
    return (softmax * (linear.sum(-1, keepdim=True).log() - linear.log())).sum(-1).mean()


def learned_map(module: nn.Module | None) -> Projection | None:
    """The learned feature map among a layer's weights; None without one."""
    return module.features if isinstance(module, SparseLinearAttention) else None


IMITATION = Objective(
    "imitation",
    trains="a learned feature map",
    record=lambda call: None if learned_map(call.module) is None else call,
    loss=imitated,
    part=learned_map,
    when=lambda config: config.feature_map == LEARNED_MAP,
    needs=f"feature_map={LEARNED_MAP}",
    alone=True,
)
METHOD = Method(
    name="sla",
    config=Config,
    plan=lambda grid, config: SlaPlan(config, grid),
    module=LearnedModule(
        attribute="sparse_linear",
        make=lambda head_dim, heads, config: SparseLinearAttention(head_dim, heads, **dataclasses.asdict(config)),
    ),
    objectives=(GATE, IMITATION),
    summary="critical key blocks exactly, a learned linear branch for the others",
    source="SLA, arXiv 2509.24006; github.com/thu-ml/SLA",
    good_for="the highest sparsity",
    needs_training=True,
    at_density=at_density,
)
