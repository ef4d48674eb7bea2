"""Proxy tokens: block-sparse attention, and a coarse branch over the blocks' means, which a learned gate lets in.

The visual tokens are cut into blocks; block j has n_j tokens and the proxies mean(K_j) and mean(V_j). For a visual
query q in block i, with the scale s of the logits

    out    = fine + (W q + b) * coarse                         * coordinate by coordinate, W [D, D] and b [D] a head
    coarse = softmax_j(s mean(Q_i) . mean(K_j) + log n_j) mean(V_j)

fine is attention to the `topk` blocks with the highest mean(Q_i) . mean(K_j), as of sparge by number, or, without any,
to the query's own block. W and b start at zero, so an untrained model computes fine alone. Text and conditioning are
exact in fine, and have no coarse branch, unless ``covers="all"``: then each run of text, conditioning or sound is cut
into blocks too, never across two runs, and all of them have proxies and ask for them.

Sources: "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389: top-k, coarse branch, gate
from zero. VSA makes its gate from the layer's hidden states, as ``gate="hidden"`` does; W q + b needs none. With
``tile=(4, 4, 4)``, ``rounding="up"`` and ``weigh="blocks"`` beside it this is the function of VSA's published weights:
its cubes, ceil(topk K) blocks, and a coarse softmax that counts all blocks alike, without log n_j. VSA in MiniMax-H3
has ``covers="all"`` besides. "Qihoo-T2X"
(PT-DiT), arXiv 2409.04005: with ``topk=0`` windows and proxies, and with ``query="token"`` each token asks the proxies
by its own q, as there. PT-DiT's proxies first attend to each other, with weights of their own, and its windows shift in
every other layer; both change the architecture.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.cuts import block_means, from_blocks, visual_of
from dit_accel.kernels.router.api import route
from dit_accel.kernels.router.rule import Rule
from dit_accel.method import LearnedModule, Method, MethodConfig
from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.routed import LARGEST_BLOCK, Ordering, RoutedPlan, cut
from dit_accel.plans.sampled import SampledQueries, pooled
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

ROUNDING = 1e-9  # of a share of blocks


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of proxy; the defaults are VSA's, whose cubes of 4 x 4 x 4 tokens are such tiles.

    Args:
        topk: share of the visual key blocks that a query block attends to, in [0, 1]. Of K blocks these are
            ``max(1, int(topk * K))``, or ``ceil`` in place of ``int`` with rounding "up". 0: its own block alone.
        query: what asks the proxies: the mean query of its "block", or each "token".
        block: tokens a block of queries or keys holds, at most 1024.
        order: "raster": blocks are runs of tokens; "tile": 3-D tiles, chosen per grid; "morton" or "hilbert": runs
            along a curve.
        gate: what the gate is a linear map of: the rotated "query" of each head, or the layer's "hidden" states.
        tile: frames, rows and columns of a tile, whose product is the block; None: chosen per grid.
        rounding: of the number of blocks, "down" or "up".
        weigh: what counts alike in the coarse softmax: "tokens" or "blocks".
        covers: what the coarse branch covers, as queries and as keys: "visual" tokens or "all".

    Raises:
        DitAccelError: the tile's product is not the block, the order is not "tile", or a gate of the query covers all.
    """

    topk: float = option(0.1, least=0, most=1, ramps=True)
    query: Literal["block", "token"] = "block"
    block: int = option(64, least=1, most=LARGEST_BLOCK)
    order: Ordering = "tile"
    gate: Literal["query", "hidden"] = "query"
    tile: tuple[int, int, int] | None = option(None, least=1)
    rounding: Literal["down", "up"] = "down"
    weigh: Literal["tokens", "blocks"] = "tokens"
    covers: Literal["visual", "all"] = "visual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None and (self.order != "tile" or math.prod(self.tile) != self.block):
            raise DitAccelError(
                f"A tile of {'x'.join(map(str, self.tile))} tokens needs order=tile and block={math.prod(self.tile)}, "
                f"got order={self.order} and block={self.block}."
            )
        if self.covers == "all" and self.gate != "hidden":
            raise DitAccelError(f"covers=all needs gate=hidden, got gate={self.gate}. Set both, or neither.")

    def count(self, blocks: int) -> int:
        """Visual key blocks that a query block attends to, of `blocks`."""
        share = self.topk * blocks
        # shares such as 0.1 are not exact, and 0.1 of 30 is 3
        return max(1, math.ceil(share - ROUNDING) if self.rounding == "up" else int(share))


class ProxyGate(nn.Module):
    """The gate of a layer. A module that is called, so offloading and FSDP reach its weights.

    Attributes:
        weight, bias: W [heads, D, D] and b [heads, D], fp32; zero at the start.
    """

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, q: Tensor, first: int = 0) -> Tensor:
        """W q + b for q [B, H, *, D] of H heads of the layer from the `first` on."""
        these = slice(first, first + q.shape[1])
        return q @ self.weight[these].to(q).mT + self.bias[these, None].to(q)


class HiddenGate(nn.Module):
    """The gate of a layer as a linear map of its hidden states; called by the model's processor.

    Attributes:
        weight, bias: fp32 [heads * D, channels] and [heads * D]; zero at the start.
    """

    reads_hidden = True

    def __init__(self, channels: int, head_dim: int, heads: int) -> None:
        super().__init__()
        if not channels:
            raise DitAccelError("gate=hidden needs a layer whose to_q shows the channels of its input; use gate=query.")
        self.weight = nn.Parameter(torch.zeros(heads * head_dim, channels))
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, N, channels] to [B, N, heads * D]."""
        return F.linear(hidden, self.weight.to(hidden), self.bias.to(hidden))


class ProxyPlan(RoutedPlan):
    """Block-sparse attention with proxies on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        if config.tile is None:
            cuts = cut(config.order, grid, config.block, config.block)
        else:
            order = TokenOrder(grid, config.block, config.tile)
            cuts = order, order, None
        super().__init__("proxy", config, grid, *cuts)

    @property
    def pairs(self) -> int:
        """As of `bound`."""
        return self.bound(self.config.count(self.key_order.visual_blocks))

    def always(self) -> tuple[int, None]:
        return self.config.count(self.key_order.visual_blocks), None

    def routing(self) -> dict[str, Any] | None:
        return {"by_number": True} if self.config.topk else None

    def choose(self, q: Tensor, k: Tensor, call: PlanArguments) -> BlockLists:
        blocks = self.key_order.visual_blocks
        if self.config.topk:
            rule = Rule(topk=self.config.count(blocks), topp=0.0)
            return route(q, k, self.query_order, self.key_order, rule, scale=call.scale, impl=call.impl)
        diagonal = torch.arange(blocks, dtype=torch.int32, device=q.device)[:, None]
        return BlockLists.full(diagonal.expand(*q.shape[:2], -1, -1).contiguous())

    def attend_visual(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> tuple[Tensor, BlockLists]:
        fine, lists = super().attend_visual(q, k, v, call)
        return (fine if self.config.covers == "all" else self._with_coarse(fine, q, k, v, call)), lists

    def with_others(self, visual: Tensor, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        out = super().with_others(visual, q, k, v, call)
        return self._with_coarse(out, q, k, v, call) if self.config.covers == "all" else out

    def _with_coarse(self, fine: Tensor, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        """`fine` of the covered tokens, with the gated coarse branch added if the layer has a gate."""
        if call.module is None:
            return fine
        if self.config.gate == "hidden":
            if call.gate is None:
                raise DitAccelError("gate=hidden reads a layer's hidden states, so it runs only in a model.")
            gate = self._covered(call.gate).to(q.dtype)
        elif isinstance(call.module, ProxyGate):
            gate = call.module(self._covered(q), 0 if call.heads is None else call.heads[0])
        else:
            raise DitAccelError(f"proxy takes a ProxyGate as its module, got {type(call.module).__name__}.")
        if self.config.covers == "all" and call.text_lens is not None:
            raise DitAccelError("covers=all takes means of all text, and this model masks some. Use covers=visual.")
        return fine + gate * self.coarse(q, k, v, call.scale, call.segments)

    def _covered(self, x: Tensor) -> Tensor:
        return x if self.config.covers == "all" else visual_of(x, self.grid)

    def parts(self, segments: tuple[tuple[int, int], ...] = ()) -> list[tuple[slice, TokenOrder]]:
        """The covered runs of tokens in the order of the sequence, and the blocks of each; `segments` as a call's."""
        grid, parts = self.grid, [(self.grid.visual_rows, self.key_order)]
        if self.config.covers == "all":
            text, conditioning = (grid.text_start, grid.text), (grid.conditioning_start, grid.conditioning)
            spans = segments or [(start, start + tokens) for start, tokens in (text, conditioning) if tokens]
            runs = ((slice(*span), TokenGrid(1, 1, span[1] - span[0])) for span in spans)
            parts += [(rows, TokenOrder(run, self.key_order.block)) for rows, run in runs]
        return sorted(parts, key=lambda part: part[0].start)

    def coarse(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, segments: tuple[tuple[int, int], ...] = ()
    ) -> Tensor:
        """The coarse branch for the whole sequence q, k, v [B, H, N, D].

        Args:
            segments: as of a call; they matter only if all tokens are covered.

        Returns:
            [B, H, N, D], or [B, H, visual, D] unless all tokens are covered, in the dtype of q.
        """
        parts, by_block = self.parts(segments), self.config.query == "block"
        queries, keys, values = (self._means(x, parts) for x in (q, k, v))
        asking = queries if by_block else self._covered(q)
        sizes = torch.cat([valid_tokens(order, q.device) for _, order in parts]).to(keys.dtype)
        bias = torch.zeros_like(sizes) if self.config.weigh == "blocks" else sizes.log()
        keys, values, bias = (x.to(asking.dtype) for x in (keys, values, bias))
        out = F.scaled_dot_product_attention(asking, keys, values, bias.expand(asking.shape[2], -1), scale=scale)
        if by_block:
            orders = [order for _, order in parts]
            blocks = out.to(q.dtype)[..., None, :].split([order.visual_blocks for order in orders], 2)
            spread = [
                from_blocks(mean.expand(-1, -1, -1, order.block, -1), order)
                for mean, order in zip(blocks, orders, strict=True)
            ]
            out = torch.cat(spread, 2) if len(spread) > 1 else spread[0]
        return out.to(q.dtype)

    def _means(self, x: Tensor, parts: list[tuple[slice, TokenOrder]]) -> Tensor:
        """Mean token of every block of some parts of x [B, H, N, D]: [B, H, blocks, D], fp32 or fp64."""
        # a slice of all tokens is x itself; see `visual_of`
        runs = [(x if rows.stop - rows.start == x.shape[2] else x[:, :, rows], order) for rows, order in parts]
        return torch.cat([block_means(run, order) for run, order in runs], 2)

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Listed blocks exactly, and the gated coarse branch; means are over all queries of the call."""
        fine = masked_attention(q, k, v, call.seen(head))
        if not weights:
            return fine
        order, block, by_block = self.key_order, self.block_of(self.key_order), self.config.query == "block"
        (keys, sizes), (values, _) = (pooled(x, order, block) for x in (k, v))
        asking = pooled(call.whole(head, q), order, block)[0] if by_block else q
        every = torch.ones(1, len(keys), dtype=torch.bool, device=q.device)
        bias = torch.zeros_like(sizes) if self.config.weigh == "blocks" else sizes.log()
        coarse = masked_attention(asking, keys, values, every, bias)
        gate = q @ weights[0][head].T + weights[1][head]
        return torch.where(call.are_visual, fine + gate * (coarse[call.blocks(block)] if by_block else coarse), fine)


def at_density(grid: TokenGrid, density: float) -> dict[str, Any]:
    """The share of visual blocks, to six digits, of which the fullest hold what the density leaves for them."""
    sizes = valid_tokens(ProxyPlan(Config(), grid).key_order).sort(descending=True).values
    error = (sizes.cumsum(0) - grid.visual_share(density) * grid.visual).abs()
    return {"topk": min(1.0, float(f"{(int(error.argmin()) + 1.5) / len(sizes):.6g}"))}


METHOD = Method(
    name="proxy",
    config=Config,
    plan=lambda grid, config: ProxyPlan(config, grid),
    module=LearnedModule(
        "proxy_gate",
        lambda head_dim, heads, config: ProxyGate(head_dim, heads),
        make_for=lambda channels, head_dim, heads, config: (
            HiddenGate(channels, head_dim, heads) if config.gate == "hidden" else None
        ),
    ),
    summary="the best key blocks exactly, and all blocks' means through a learned gate",
    source="VSA, arXiv 2505.13389; Qihoo-T2X, arXiv 2409.04005",
    good_for="a trained global view beside few exact blocks",
    needs_training=True,
    at_density=at_density,
)
