"""Mixture of heads (MoH): shared heads are computed for every token, and a router takes some of the others.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv:2410.11842) and its code, SkyworkAI/MoH. Of h
heads the first s are shared; k of the others are taken for token t. The output is the sum of g_i H^i W_O^i over heads
(equation 4), where H^i is dense attention:

    p   = softmax over the routed heads of W_r x_t;  T = the k heads with the largest p
    g_i = 1 for shared heads and those of T, else 0                       weights="one"
    g_i = a_1 s softmax(W_s x_t)_i for shared heads, a_2 (h - s) p_i for those of T, else 0,
          with (a_1, a_2) = 2 softmax(W_h x_t)                            weights="scores", equations 5 and 6

"one" is how the authors convert a trained LLaMA3: the gradient of p_i is that of g_i, for every routed head. So
training computes all heads. Otherwise the rows of a head that tokens did not take are never computed. Our choices:

- The router reads q_t of all heads, with rotary positions, since processors do not get x_t; it sends q no gradient.
- |q_t^i| / sqrt(D) is added to its logit i, and its weights start at zero. An untrained router thus takes the heads of
  the authors' parameter-free one.
- s, h - s and 2 make the weights 1 where scores are equal, as in the authors' code for DiT, which also divides p by its
  sum over T.
- Text and conditioning tokens take every head with weight 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import in_autocast_dtype
from dit_accel.kernels.block_sparse.dense import zeros_spread
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.impls import AUTO
from dit_accel.method import LearnedModule, Method, MethodConfig, Objective
from dit_accel.plans.dense import SDPA, DensePlan
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.sampled import SampledQueries
from dit_accel.tokens import TokenGrid
from dit_accel.values import option

if TYPE_CHECKING:
    from dit_accel.hooks.selfcheck import ComputedAttention

_ROUNDING = 0.01  # of a head, for shares such as 0.333


@dataclasses.dataclass(frozen=True)
class Config(MethodConfig):
    """Settings of moh; the defaults are those of MoH-LLaMA3-8B.

    Args:
        shared: share of the heads that are always on, the first of the layer, in [0, 1).
        routed: share of the heads that a token takes besides, in (0, 1].
        weights: "one": of computed heads, as for a converted model; "scores": of the router's two stages.

    Raises:
        DitAccelError: a value is out of range, or both shares exceed 1 together.
    """

    shared: float = option(0.5, least=0, below=1)
    routed: float = option(0.25, above=0, most=1)
    weights: Literal["one", "scores"] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skipped < 0:
            raise DitAccelError(
                f"shared and routed are shares of the same heads and cannot exceed 1 together; got {self.shared} and "
                f"{self.routed}. Lower one of them."
            )

    @property
    def skipped(self) -> float:
        """The share of the heads that a token does not take."""
        return round(1 - self.shared - self.routed, 9)

    @property
    def keeps_all(self) -> bool:
        """Whether every head is computed with weight 1."""
        return self.weights == "one" and self.skipped == 0

    def counts(self, heads: int) -> tuple[int, int]:
        """The shared heads of a layer, and the routed ones that a token takes.

        Raises:
            DitAccelError: a share is no whole number of heads.
        """
        for name, share in (("shared", self.shared), ("routed", self.routed)):
            if abs(share * heads - round(share * heads)) > _ROUNDING or (share and not round(share * heads)):
                raise DitAccelError(
                    f"{name}={share} of {heads} heads is not a whole number. Choose a multiple of 1/{heads}."
                )
        return round(self.shared * heads), round(self.routed * heads)


class Gates(NamedTuple):
    """What a router decides for every token: the routed heads that are computed, g in fp32 or fp64, and p."""

    taken: Tensor  # bool [B, h - s, N]
    weights: Tensor  # [B, h, N]
    shares: Tensor  # [B, h - s, N]


class HeadRouter(nn.Module):
    """The router of a layer. It needs no gradient until it is trained.

    A module that is called, so offloading and FSDP reach its weight.

    Attributes:
        weight: fp32 [h - s, h D], W_r; with "scores" and shared heads also the rows of W_s and the two of W_h.
    """

    def __init__(self, head_dim: int, heads: int, config: Config) -> None:
        super().__init__()
        self.config, (self.shared, self.routed) = config, config.counts(heads)
        rows = heads + 2 if config.weights == "scores" and self.shared else heads - self.shared
        self.weight = nn.Parameter(torch.zeros(rows, heads * head_dim), requires_grad=False)

    def forward(self, q: Tensor) -> Gates:
        """The gates of queries [B, h, N, D]."""
        q, shared = q.detach(), self.shared
        wide, routed = torch.promote_types(q.dtype, torch.float32), q.shape[1] - shared
        logits = F.linear(q.transpose(1, 2).flatten(2), self.weight.to(q)).to(wide).mT
        norms = torch.linalg.vector_norm(q[:, shared:], dim=-1, dtype=wide) * q.shape[-1] ** -0.5
        shares = (logits[:, :routed] + norms).softmax(1)
        taken = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, shares.topk(self.routed, 1).indices, True)
        if self.config.weights == "one":
            weights, first = taken + (shares - shares.detach()), torch.ones_like(shares[:, :1]).expand(-1, shared, -1)
        elif shared:
            stages = 2 * logits[:, -2:].softmax(1)
            weights = stages[:, 1:] * routed * shares * taken
            first = stages[:, :1] * shared * logits[:, routed:-2].softmax(1)
        else:
            weights, first = routed * shares * taken, shares[:, :0]
        return Gates(taken, torch.cat([first, weights], 1), shares)


class MohPlan(DensePlan):
    """Dense attention of the heads that each token takes, on one grid."""

    config: Config

    def __init__(self, config: Config, grid: TokenGrid) -> None:
        super().__init__("moh", config, grid)
        self.head_share = self.density

    @property
    def needs_whole(self) -> str | None:
        return "it chooses heads of the whole sequence in each call"

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs of a head, text included, as a mean over all heads."""
        return round(self.grid.tokens * (self.grid.tokens - self.config.skipped * self.grid.visual))

    def gates(self, q: Tensor, module: nn.Module | None) -> Gates:
        """The gates of the whole sequence [B, h, N, D]. Without a module its weight counts as it starts."""
        if not isinstance(module, HeadRouter):
            module = HeadRouter(q.shape[-1], q.shape[1], self.config).to(q.device)
        routed: Gates = module(q)
        others = torch.ones(self.grid.tokens, dtype=torch.bool, device=q.device)
        others[self.grid.visual_rows] = False
        return Gates(routed.taken | others, routed.weights.masked_fill(others, 1), routed.shares)

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor, **call: Any) -> BlockLists:
        """The heads of each visual token, as lists of the one block that holds all keys."""
        computed = (self.gates(q, call.get("module")).weights[:, :, self.grid.visual_rows] != 0).int()
        return BlockLists(torch.zeros_like(computed)[..., None], computed)

    def kept_keys(self, queries: Tensor, lists: BlockLists | None = None, head: int = 0) -> Tensor:
        assert lists is not None, "a router keeps what a call takes"
        return super().kept_keys(queries) & lists.counts[0, head, queries, None].bool()

    def balance(self, q: Tensor, module: nn.Module | None) -> Tensor:
        """The load-balance loss of a call, equation 7: the sum over routed heads of f_i P_i.

        f_i is the share of the visual tokens that take head i, P_i the mean of their p_i. Both average over samples.
        """
        gates, visual = self.gates(q, module), self.grid.visual_rows
        taken, shares = gates.taken[..., visual].to(gates.shares), gates.shares[..., visual]
        return (taken.mean((0, 2)) * shares.mean((0, 2))).sum()

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: PlanArguments) -> Tensor:
        """A named implementation, a router in training and weighed text compute all heads of every token."""
        if self.config.keeps_all:
            return super().run(q, k, v, call)
        if call.heads is not None and call.heads[1] > q.shape[1]:
            raise DitAccelError(
                f"moh compares all {call.heads[1]} heads of a token, and under context parallelism a process has "
                f"{q.shape[1]}. Use another method, such as heads."
            )
        q, k, v = in_autocast_dtype(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            gates = self.gates(q, call.module)
            trains = torch.is_grad_enabled() and gates.weights.requires_grad
            whole = trains or call.impl not in (AUTO, SDPA) or call.text_bias is not None
            out = super().run(q, k, v, call) if whole else self._taken(q, k, v, gates.taken, call)
            return out if self.config.weights == "one" and not whole else out * gates.weights[..., None].to(q.dtype)

    def _taken(self, q: Tensor, k: Tensor, v: Tensor, taken: Tensor, call: PlanArguments) -> Tensor:
        """The rows that heads compute; zero elsewhere. Waits for the device once."""
        out, shared, valid = zeros_spread(q), q.shape[1] - taken.shape[1], None
        if call.text_lens is not None:
            place = torch.arange(self.grid.tokens, device=q.device) - self.grid.text_start
            valid = (place < call.text_lens.to(q.device)[:, None]) | (place < 0) | (place >= self.grid.text)
            valid = valid[:, None, None]  # [B, 1, 1, N]
        if shared:
            queries, keys, values = (x[:, :shared] for x in (q, k, v))
            out[:, :shared] = F.scaled_dot_product_attention(queries, keys, values, valid, scale=call.scale)
        rows = taken.byte().argsort(dim=-1, descending=True, stable=True)
        for sample, counts in enumerate(taken.sum(-1).tolist()):
            mask = None if valid is None else valid[sample]
            for routed, count in enumerate(counts):
                tokens, at = rows[sample, routed, :count], (sample, slice(shared + routed, shared + routed + 1))
                out[sample, shared + routed, tokens] = F.scaled_dot_product_attention(
                    q[at][None, :, tokens], k[at][None], v[at][None], attn_mask=mask, scale=call.scale
                )[0, 0]
        return out

    def reference(self, call: SampledQueries, head: int, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        """Dense attention of each head, times the gates of the queries."""
        gates = call.once("gates", lambda: self.gates(call.q, call.module).weights[0, :, call.rows, None])
        every = torch.ones(1, len(k), dtype=torch.bool, device=k.device)
        return masked_attention(q, k, v, every) * gates[head].to(q)


def balance(call: ComputedAttention) -> Tensor:
    """The load-balance loss of a layer; the authors weigh it by 0.01. It has a gradient for the router alone."""
    assert isinstance(call.plan, MohPlan)
    return call.plan.balance(call.q, call.module)


BALANCE = Objective(
    "balance",
    trains="a router of heads",
    record=lambda call: call if isinstance(call.plan, MohPlan) else None,
    loss=balance,
)
METHOD = Method(
    "moh",
    Config,
    lambda grid, config: MohPlan(config, grid),
    "dense attention in some heads, which a learned router chooses for each token",
    source="MoH, arXiv:2410.11842; github.com/SkyworkAI/MoH",
    good_for="fewer heads than a calibration can skip",
    needs_training=True,
    experimental=True,
    module=LearnedModule("head_router", HeadRouter),
    objectives=(BALANCE,),
)
