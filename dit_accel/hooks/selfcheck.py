"""The error of a method's attention against dense attention, measured in real calls on a sample of their queries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from dit_accel.errors import DitAccelError
from dit_accel.method import MethodConfig
from dit_accel.plans.plan import Plan
from dit_accel.plans.routed import RoutedPlan
from dit_accel.schedule import Step
from dit_accel.values import check, option

if TYPE_CHECKING:
    from dit_accel.hooks.accelerated_layer import AcceleratedLayer
    from dit_accel.pipelines.attention import CallState

Verify = Literal["first-call"]
ROWS = 256  # queries measured of each head
CHUNK = 2**25  # logits held at once, 128 MiB


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """`verify` and `keep_dense_above` as in `accelerate`.

    Raises:
        DitAccelError: a value is out of range, or there is a limit without a check.
    """

    verify: Verify | None = None
    keep_dense_above: float | None = option(None, above=0)

    def __post_init__(self) -> None:
        check(self)
        if self.keep_dense_above is not None and self.verify is None:
            raise DitAccelError(
                f"keep_dense_above={self.keep_dense_above} needs verify='first-call', which measures the errors."
            )

    def refuse_shared(self, configs: Iterable[MethodConfig]) -> None:
        """Refuse to verify settings whose first call is dense."""
        if self.verify is not None and any(config.share != "none" for config in configs):
            raise DitAccelError(
                "verify='first-call' would measure the first call, in which layers with share=... are dense. Verify "
                "the same settings with share='none'."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedAttention:
    """One sparse attention call of a layer, as it was computed.

    Under context parallelism the heads are those that this process was given, and the sequence is whole.

    Args:
        transformer, layer: names, as in the report.
        step: the denoising step; None if unknown.
        plan: the plan that computed it.
        q, k, v, out: [B, H, N, D] in the plan's order of tokens.
        scale, text_lens, text_bias, module, heads: as in `PlanArguments`.
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
    module: torch.nn.Module | None = None
    heads: tuple[int, int] | None = None

    @torch.no_grad()
    def measure(self, rows: int = ROWS) -> Measured:
        """Compare the result with dense attention on a sample of the visual queries.

        Text and conditioning queries attend to everything, so they are left out. Logits and softmax are fp32 (fp64 for
        fp64 inputs), for one head and a few queries at a time: never N x N.

        Args:
            rows: visual queries to sample, the same in every head and call; all if there are fewer.
        """
        plan, q, k, v, out = self.plan, self.q, self.k, self.v, self.out
        batch, heads, *_ = q.shape
        queries = sample(plan.grid.visual, rows).to(q.device)
        sums = torch.zeros(3, batch, heads, dtype=torch.float64, device=q.device)
        attended, first = None, 0 if self.heads is None else self.heads[0]
        for b in range(batch):
            settings = {"scale": self.scale, "module": self.module, "heads": self.heads}
            lists = plan.route(q[b : b + 1], k[b : b + 1], values=v[b : b + 1], **settings)
            for h in range(heads):
                if attended is None or lists is not None or plan.head_share < 1:
                    attended = plan.kept_keys(queries, lists, h if lists is not None else first + h)
                for chunk, weights in self.dense_weights(b, h, queries):
                    dense = weights @ v[b, h].to(weights)
                    result = out[b, h, queries[chunk] + plan.grid.visual_start].to(weights)
                    sums[0, b, h] += (result - dense).square().sum(dtype=torch.float64)
                    sums[1, b, h] += dense.square().sum(dtype=torch.float64)
                    sums[2, b, h] += (weights * attended[chunk]).sum(dtype=torch.float64)
        return Measured(sums[0], sums[1], sums[2] / len(queries))

    def dense_weights(self, b: int, h: int, queries: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Dense attention's softmax of some visual queries of a sample and head, a few at a time.

        Args:
            queries: int64, from the first visual token.

        Yields:
            Places in `queries`, int64 [n], and weights, fp32 or fp64 [n, N].
        """
        q, grid, (*_, tokens, dim) = self.q, self.plan.grid, self.q.shape
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        factor = dim**-0.5 if self.scale is None else self.scale
        valid = torch.ones(tokens, dtype=torch.bool, device=q.device)
        if self.text_lens is not None:
            position = torch.arange(tokens, device=q.device) - grid.text_start
            valid = (position < self.text_lens[b].to(q.device)) | (position >= grid.text) | (position < 0)
        key = self.k[b, h].to(wide)
        for chunk in torch.arange(len(queries), device=q.device).split(max(1, CHUNK // tokens)):
            at = queries[chunk] + grid.visual_start
            logits = q[b, h, at].to(wide) @ key.T * factor
            bias = -torch.inf if self.text_bias is None else self.text_bias[b, at, None].to(logits)
            yield chunk, torch.where(valid, logits, logits + bias).softmax(-1)


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
        """Sums over samples and heads for `whole`: float64 [4]. Processes with different heads add them up."""
        count = torch.tensor(float(self.mass.numel()), dtype=torch.float64, device=self.mass.device)
        return torch.stack([self.difference.sum(), self.size.sum(), self.mass.sum(), count])


class Watching:
    """What looks at the sparse attention calls of a transformer: the check of the first ones, and watchers.

    Args:
        name: of the transformer.
        heads: the number of a layer's heads, from its module.
        dense: the states of layers that stay dense, by whether they see text.

    Attributes:
        watchers: functions called with every sparse attention call.
        unchecked: whether a call is still to be checked.
        checking: whether the transformer's call under way is checked.
    """

    def __init__(
        self, name: str, check: SelfCheck, heads: Callable[[Any], int], dense: Mapping[bool, CallState]
    ) -> None:
        self._name, self._check, self._heads, self._dense = name, check, heads, dense
        self.watchers: list[Callable[[ComputedAttention], None]] = []
        self.unchecked, self.checking = check.verify is not None, False

    @property
    def listening(self) -> bool:
        """Whether anything looks at the next sparse calls."""
        return self.unchecked or bool(self.watchers)

    def begin(self, layers: Iterable[AcceleratedLayer], step: Step | None) -> None:
        """Have the layers of a transformer's call report what they compute, if anything looks at it."""
        listening, self.checking = self.listening, self.unchecked
        for layer in layers:
            layer.ours.watch = functools.partial(self._attended, layer, step) if listening else None

    def end(self) -> None:
        """After a call: it was checked. One that failed in the middle is followed by another check."""
        self.unchecked = self.unchecked and not self.checking

    def _attended(
        self,
        layer: AcceleratedLayer,
        step: Step | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        scale: float | None,
        state: CallState,
    ) -> None:
        """Check a layer's sparse attention if asked for, and show it to the watchers."""
        assert state.plan is not None
        if layer.ours.arranged and isinstance(state.plan, RoutedPlan):
            q, k, v, out = (state.plan.restore(x) for x in (q, k, v, out))
        text, heads = state.text_of(len(q)), self._heads(layer.attention)
        held = None if state.ulysses is None else (state.ulysses.first_head(heads), heads)
        call = ComputedAttention(
            self._name, layer.name, step, state.plan, q, k, v, out, scale, *text, layer.learned, held
        )
        if self.checking:
            sums = call.measure().sums()
            layer.measured = sums if state.ulysses is None else state.ulysses.add_up(sums)
            limit = self._check.keep_dense_above
            if limit is not None and not (error := whole(layer.measured)[0]) <= limit:  # nan stays dense
                layer.dense_reason = f"keep_dense_above={limit}: relative error {error:.3g}"
                layer.ours.state = self._dense[layer.sees_text]  # in this call already
        for watcher in self.watchers:
            watcher(call)


def whole(sums: torch.Tensor) -> tuple[float, float]:
    """Relative error and kept mass of a whole call, from `Measured.sums`."""
    difference, size, mass, count = sums.tolist()
    if size == 0:
        return (math.inf if difference else 0.0), mass / count
    return (difference / size) ** 0.5, mass / count


def sample(total: int, count: int) -> torch.Tensor:
    """`count` random indices below `total`, the same in every call, ascending: int64."""
    if count >= total:
        return torch.arange(total, device="cpu")
    return torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values
