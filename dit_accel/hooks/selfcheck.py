"""How far a method's attention is from dense attention: measured on real calls, on a sample of their queries."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.hooks.schedule import Step
from dit_accel.plans.plan import Plan
from dit_accel.plans.routed import RoutedPlan

Verify = Literal["first-call"]
ROWS = 256  # queries measured of each head
CHUNK = 2**25  # logits held at once, 128 MiB


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """What `accelerate(..., verify=..., keep_dense_above=...)` asks for.

    Args:
        verify: "first-call": compare every layer of the first sparse call with dense attention; None: nothing.
        keep_dense_above: relative error above which a layer then stays dense; None: report only.

    Raises:
        DitAccelError: a value is neither, or there is a limit without a check.
    """

    verify: Verify | None = None
    keep_dense_above: float | None = None

    def __post_init__(self) -> None:
        if self.verify not in (None, "first-call"):
            raise DitAccelError(f"verify is 'first-call' or None, got {self.verify!r}.")
        limit = self.keep_dense_above
        if limit is None:
            return
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise DitAccelError(f"keep_dense_above is a relative error above 0, such as 0.1; got {limit!r}.")
        if self.verify is None:
            raise DitAccelError(f"keep_dense_above={limit} needs verify='first-call', which finds the errors.")

    def keeps_dense(self, error: float) -> bool:
        """Whether a layer of that relative error stays dense; one that is not a number does."""
        return self.keep_dense_above is not None and not error <= self.keep_dense_above


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """One sparse attention call of a layer, as it was computed.

    Under context parallelism the heads are this process's, and the sequence is whole.

    Args:
        transformer, layer: names, as in the report.
        step: the denoising step; None where nothing tells it.
        plan: what computed it.
        q, k, v, out: [B, H, N, D] in the plan's order of tokens.
        scale: factor of the logits; D ** -0.5 if None.
        text_lens: int [B], valid text tokens of each sample; None: all.
        text_bias: as in `Plan.attend`.
    """

    transformer: str
    layer: str
    step: Step | None
    plan: Plan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    scale: float | None = None
    text_lens: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None

    def measure(self, rows: int = ROWS) -> Measured:
        """See `measure`."""
        return measure(
            self.q, self.k, self.v, self.out, self.plan,
            scale=self.scale, text_lens=self.text_lens, text_bias=self.text_bias, rows=rows,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A call against dense attention, by sample and head.

    Args:
        difference: squared norm of sparse minus dense over the sampled rows, float64 [B, H].
        size: squared norm of dense, float64 [B, H].
        mass: share of dense attention's softmax weight that lies on kept keys, averaged over the rows, float64 [B, H].
    """

    difference: torch.Tensor
    size: torch.Tensor
    mass: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """Norm of the difference over the norm of dense attention: [B, H]."""
        return (self.difference / self.size).sqrt()

    def sums(self) -> torch.Tensor:
        """What is added up over processes that have different heads: float64 [4], for `whole`."""
        count = torch.tensor(float(self.mass.numel()), dtype=torch.float64, device=self.mass.device)
        return torch.stack([self.difference.sum(), self.size.sum(), self.mass.sum(), count])


def whole(sums: torch.Tensor) -> tuple[float, float]:
    """Relative error and kept mass of a whole call, from `Measured.sums`; where dense attention is 0, 0 or infinity."""
    difference, size, mass, count = sums.tolist()
    if size == 0:
        return (math.inf if difference else 0.0), mass / count
    return (difference / size) ** 0.5, mass / count


@torch.no_grad()
def measure(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    text_lens: torch.Tensor | None = None,
    text_bias: torch.Tensor | None = None,
    rows: int = ROWS,
) -> Measured:
    """Compare a sparse result with dense attention on a sample of the visual queries.

    Text and conditioning queries attend to everything, so they say nothing. Logits and softmax are fp32 (fp64 for fp64
    inputs), a head and a few queries at a time: never N x N.

    Args:
        q, k, v, out: [B, H, N, D] with N = plan.grid.tokens.
        plan: whose `out` it is.
        scale: factor of the logits; D ** -0.5 if None.
        text_lens: int [B], valid text tokens of each sample; text behind them is never a key. None: all of them.
        text_bias: as in `Plan.attend`.
        rows: visual queries to sample, the same in every head and call; all if there are fewer.
    """
    grid, (batch, heads, tokens, dim) = plan.grid, q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = dim**-0.5 if scale is None else scale
    queries = sample(grid.visual, rows).to(q.device)
    position = torch.arange(tokens, device=q.device) - grid.text_start
    found = torch.zeros(3, batch, heads, dtype=torch.float64, device=q.device)
    kept = None
    for b in range(batch):
        valid = torch.ones(tokens, dtype=torch.bool, device=q.device)
        if text_lens is not None:
            valid = (position < text_lens[b].to(q.device)) | (position >= grid.text) | (position < 0)
        for h in range(heads):
            one = slice(b, b + 1), slice(h, h + 1)
            if kept is None or isinstance(plan, RoutedPlan):
                kept = plan.kept_keys(queries, q[one], k[one])
            key, value = k[b, h].to(wide), v[b, h].to(wide)
            for chunk in torch.arange(len(queries), device=q.device).split(max(1, CHUNK // tokens)):
                at = queries[chunk] + grid.visual_start
                logits = q[b, h, at].to(wide) @ key.T * factor
                bias = -torch.inf if text_bias is None else text_bias[b, at, None].to(logits)
                weights = torch.where(valid, logits, logits + bias).softmax(-1)
                dense = weights @ value
                found[0, b, h] += (out[b, h, at].to(wide) - dense).square().sum(dtype=torch.float64)
                found[1, b, h] += dense.square().sum(dtype=torch.float64)
                found[2, b, h] += (weights * kept[chunk]).sum(dtype=torch.float64)
    return Measured(found[0], found[1], found[2] / len(queries))


def sample(total: int, count: int) -> torch.Tensor:
    """`count` of `total` indices without order in them, always the same, ascending: int64."""
    if count >= total:
        return torch.arange(total, device="cpu")
    return torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values
