"""A learned gate for the router: pooled queries and keys pass through two small matrices a head, then are compared.

For query block i and key block j of one head of D dimensions, with maxima and minima coordinate by coordinate:

    a_i  = mean(Q_i)                                   [D]
    b_j  = (mean(K_j), max(K_j), min(K_j))             [3 D]
    x_ij = (W_q a_i) . (W_k b_j)                       the score, in place of mean(Q_i) . mean(K_j)

W_q [D, D] starts as the identity and W_k [D, 3 D] as (identity, 0, 0), so x is the score of means at the start. The
matrices imitate the layer's own dense attention A = softmax(s q k^T), where s is the scale of the logits:

    T_ij = max of A over the pairs of a token of i and a token of j, divided by its sum over j
    loss = mean over i of KL(T_i || softmax_j(s x_ij))

Source: SeerAttention, arXiv 2410.13276: its pooling, its max-pooled map and its loss. The paper pools q and k before
rotary positions, here they are pooled after them. Text and conditioning keys take part in A and have no T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.kernels.cuts import block_means, to_blocks, visual_of
from dit_accel.order import TokenOrder
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.routed import RoutedPlan

if TYPE_CHECKING:
    from dit_accel.hooks.selfcheck import ComputedAttention


class BlockGate(nn.Module):
    """The matrices of a layer's heads; they need no gradient unless the objective `gate` trains them.

    A module that is called, so offloading and FSDP reach its weights.

    Attributes:
        queries, keys: W_q [heads, D, D] and W_k [heads, D, 3 D], fp32.
    """

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        eye = torch.eye(head_dim).repeat(heads, 1, 1)
        self.queries = nn.Parameter(eye, requires_grad=False)
        self.keys = nn.Parameter(F.pad(eye, (0, 2 * head_dim)), requires_grad=False)

    def forward(self, a: Tensor, b: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """W_q a [B, H, query blocks, D] and W_k b [B, H, key blocks, D], whose products are the scores.

        Args:
            a, b: of `pool`, of H heads of the layer from the `first` on.
        """
        these = slice(first, first + a.shape[1])
        return a @ self.queries[these].to(a).mT, b @ self.keys[these].to(b).mT


def gate_of(module: nn.Module | None) -> BlockGate | None:
    """The gate among a layer's learned weights; None without one."""
    parts = () if module is None else module.modules()
    return next((part for part in parts if isinstance(part, BlockGate)), None)


@torch.no_grad()
def pool(q: Tensor, k: Tensor, query_order: TokenOrder, key_order: TokenOrder) -> tuple[Tensor, Tensor]:
    """a [B, H, query blocks, D] and b [B, H, key blocks, 3 D], fp32 or fp64, of the whole sequence [B, H, N, D]."""
    queries, keys = (visual_of(x, key_order.grid) for x in (q, k))
    means, lows = block_means(keys, key_order), to_blocks(keys, key_order)
    highs = lows
    if key_order.visual_blocks * key_order.block > key_order.grid.visual:
        empty = to_blocks(keys.new_ones(keys.shape[-2], 1), key_order) == 0  # [blocks, block, 1]
        highs, lows = (lows.masked_fill(empty, end) for end in (-torch.inf, torch.inf))
    return block_means(queries, query_order), torch.cat([means, highs.amax(-2).to(means), lows.amin(-2).to(means)], -1)


@torch.no_grad()
def gated(q: Tensor, k: Tensor, orders: tuple[TokenOrder, TokenOrder], call: PlanArguments) -> tuple[Tensor, Tensor]:
    """The vectors of query blocks and key blocks whose products are the scores; without a gate the blocks' means."""
    gate = gate_of(call.module)
    a, b = pool(q, k, *orders)
    return (a, b[..., : a.shape[-1]]) if gate is None else gate(a, b, 0 if call.heads is None else call.heads[0])


class GateSample(NamedTuple):
    """A call of a layer with a gate; `target` is T [B, H, query blocks, key blocks], the others as in `BlockGate`."""

    gate: BlockGate
    a: Tensor
    b: Tensor
    target: Tensor
    scale: float
    first: int


def divergence(sample: GateSample) -> Tensor:
    """The gate's loss against T."""
    queries, keys = sample.gate(sample.a, sample.b, sample.first)
    shares = (sample.scale * queries @ keys.mT).log_softmax(-1)
    return F.kl_div(shares, sample.target.to(shares), reduction="sum") / sample.target[..., 0].numel()


def gate_sample(call: ComputedAttention) -> GateSample | None:
    """What a call teaches its layer's gate; None without a gate. Nothing carries a gradient to the model."""
    gate, plan = gate_of(call.module), call.plan
    if gate is None or not isinstance(plan, RoutedPlan):
        return None
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    pooled = pool(plan.arrange(call.q), plan.arrange(call.k), plan.query_order, plan.key_order)
    return GateSample(gate, *pooled, pooled_map(call), scale, 0 if call.heads is None else call.heads[0])


@torch.no_grad()
def pooled_map(call: ComputedAttention) -> Tensor:
    """T of the module's equations: [B, H, query blocks, key blocks], each row sums to 1.

    Dense attention is computed for a few queries at a time and pooled at once: never N x N.
    """
    plan, (batch, heads, *_), grid = call.plan, call.q.shape, call.plan.grid
    assert isinstance(plan, RoutedPlan)
    rows, columns = (plan.block_of(order).to(call.q.device) for order in (plan.query_order, plan.key_order))
    queries, blocks = torch.arange(grid.visual, device=call.q.device), plan.key_order.visual_blocks
    largest = torch.zeros(
        batch, heads, plan.query_order.visual_blocks, blocks, device=call.q.device,
        dtype=torch.promote_types(call.q.dtype, torch.float32),
    )  # fmt: skip
    for b in range(batch):
        for h in range(heads):
            for chunk, weights in call.dense_weights(b, h, queries):
                visual = weights[:, grid.visual_rows]
                of_blocks = visual.new_zeros(len(chunk), blocks)
                of_blocks.scatter_reduce_(1, columns.expand_as(visual), visual, "amax")
                largest[b, h].scatter_reduce_(0, rows[chunk, None].expand_as(of_blocks), of_blocks, "amax")
    return largest / largest.sum(-1, keepdim=True)
