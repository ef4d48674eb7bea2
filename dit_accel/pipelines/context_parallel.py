"""Context parallelism around an accelerated attention call: Ulysses, a ring (`pipelines.ring`), or both.

Diffusers gives each process a share of the sequence. An all-to-all before attention gives each process the whole
sequence for a share of the heads; a second one undoes it. Text and image are sharded separately: process r holds
``[text_r | image_r]``. The gathered sequence is put into model order, and the output back into each process's order.
Lengths and heads that do not divide by the number of processes are shared as evenly as possible. In a ring, groups of
neighbouring processes do this with a range of the sequence each.

Source: DeepSpeed Ulysses, arXiv:2309.14509; the sharding is that of ``diffusers/hooks/context_parallel.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.ring import Ring, Traffic
from dit_accel.pipelines.sharding import Sharding, Shares, exchange, shared_of
from dit_accel.plans.plan import Plan, PlanArguments
from dit_accel.plans.ranges import even_shares, ranges_of, streams_of
from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """How one call's sequence is sharded.

    Args:
        group: the processes.
        rank: of this process in the group.
        parts: for each separately sharded part of the sequence, in model order, the tokens of each process.
        traffic: counts.
        ring: the processes that hold the other ranges of the sequence; None if the group holds all of it.
    """

    group: Any
    rank: int
    parts: tuple[Shares, ...]
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    ring: Ring | None = None

    @property
    def tokens(self) -> Shares:
        """Tokens of each process."""
        return tuple(sum(shares) for shares in zip(*self.parts, strict=True))

    def first_head(self, heads: int) -> int:
        """The first of a layer's `heads` that this process computes."""
        return sum(even_shares(heads, len(self.tokens))[: self.rank])

    def attend(
        self, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments
    ) -> torch.Tensor:
        """The plan's attention of what the group has gathered, as `Plan.run`."""
        self.traffic.calls += 1
        return plan.run(q, k, v, call) if self.ring is None else self.ring.attend(plan, q, k, v, call)

    @exchange
    def gather(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This process's heads of all the group's tokens: [B, H, n, D] each to [B, h, N, D] in model order.

        `order` is that in which processes take heads, int64 [H]; None: the model's.
        """
        stacked = torch.stack((q, k, v))
        stacked = stacked if order is None else stacked.index_select(2, order)
        _, batch, heads, _, dim = stacked.shape
        shares = even_shares(heads, len(self.tokens))
        share = shares[self.rank]
        received = self._trade(stacked.split(shares, dim=2), [(3, batch, share, tokens, dim) for tokens in self.tokens])
        # held[process][part]
        held = [piece.split([part[rank] for part in self.parts], dim=3) for rank, piece in enumerate(received)]
        query, key, value = torch.cat([piece for part in zip(*held, strict=True) for piece in part], dim=3).unbind()
        return query, key, value

    @exchange
    def scatter(self, out: torch.Tensor, heads: int, order: torch.Tensor | None = None) -> torch.Tensor:
        """The reverse for the result: [B, h, N, D] to [B, H, n, D], laid out as [B, n, H, D] in memory."""
        batch, _, _, dim = out.shape
        pieces = iter(out.split(list(itertools.chain(*self.parts)), dim=2))
        by_part = [[next(pieces) for _ in part] for part in self.parts]
        sent = [torch.cat(piece, dim=2) for piece in zip(*by_part, strict=True)]
        tokens = self.tokens[self.rank]
        shapes = [(batch, share, tokens, dim) for share in even_shares(heads, len(self.tokens))]
        whole = torch.cat([piece.transpose(1, 2) for piece in self._trade(sent, shapes)], dim=2)
        return (whole if order is None else whole.index_select(2, order.argsort())).transpose(1, 2)

    def of_all_heads(self, pairs: torch.Tensor, heads: int, order: torch.Tensor | None) -> torch.Tensor:
        """The pairs of all heads, float32 [H] in the model's order, from those of this process's heads."""
        first, every = self.first_head(heads), pairs.new_zeros(heads)
        every[first : first + len(pairs)] = pairs
        every = self.add_up(every)
        return every if order is None else every[order.argsort()]

    @exchange
    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, so that all take the same decision."""
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def _trade(self, sent: Any, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Send the r-th tensor to process r, receive one of the r-th shape from it; differentiable and traceable."""
        from torch.distributed import _functional_collectives as collectives

        if len(shapes) == 1:
            return [sent[0]]
        self.traffic.exchanged += sum(tensor.numel() for rank, tensor in enumerate(sent) if rank != self.rank)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([tensor.reshape(-1) for tensor in sent])
        received = collectives.all_to_all_single_autograd(flat, sizes, [tensor.numel() for tensor in sent], self.group)
        return [piece.view(shape) for piece, shape in zip(received.split(sizes), shapes, strict=True)]


def config_of(transformer: nn.Module) -> Any | None:
    """The transformer's context parallel settings, or None."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def check(transformer: nn.Module, heads: int) -> None:
    """Refuse settings that no call can run with.

    Raises:
        DitAccelError: the model is sharded by an unknown plan or in Diffusers' ring, or has too few heads.
    """
    config, name = config_of(transformer), type(transformer).__name__
    if config is None:
        return
    if config.ring_degree > 1 and shared_of(transformer) is None:
        raise DitAccelError(
            f"{name} runs with ring_degree={config.ring_degree} of enable_parallelism, whose ring knows no method. "
            f"Call dit_accel.parallelize(pipe, ring={config.ring_degree}) in its place."
        )
    if shared_of(transformer) is None and not _shares_as_declared(transformer):
        raise DitAccelError(
            f"{name} runs with context parallelism, but not by a _cp_plan of its class, so the tokens of a process "
            "are unknown. Call dit_accel.parallelize() in place of enable_parallelism, or enable_parallelism without "
            "its argument cp_plan."
        )
    ranks = config.ulysses_degree
    if heads < ranks or (heads % ranks and not _shares_anything(transformer)):
        advice = (
            f"use at most {heads} processes for one sequence"
            if heads < ranks
            else "pass ulysses_anything=True, or use a number that divides them"
        )
        raise DitAccelError(f"{name} has {heads} attention heads, which {ranks} processes cannot share: {advice}.")


def sharing(transformer: nn.Module, grid: TokenGrid, traffic: Traffic) -> Ulysses | None:
    """How a call's sequence is sharded; None if one process holds it all.

    Raises:
        DitAccelError: the length does not divide by the number of processes, where Diffusers requires it.
    """
    config = config_of(transformer)
    if config is None:
        return None
    ulysses, separate = config.ulysses_degree, _separate(transformer)
    ranks, parts = ulysses * config.ring_degree, []
    for start, stop in streams_of(grid, separate):
        length = stop - start
        if length < ranks or (length % ranks and not _shares_anything(transformer)):
            raise DitAccelError(
                f"{type(transformer).__name__} with {grid} shares {length} tokens among {ranks} processes, which does "
                "not divide evenly: pass ulysses_anything=True to ContextParallelConfig, or choose another size."
            )
        first = config._ring_local_rank * ulysses if config.ring_degree > 1 else 0
        parts.append(even_shares(length, ranks)[first : first + ulysses])
    ring = None
    if config.ring_degree > 1:
        ranges = ranges_of(grid, ulysses, config.ring_degree, separate)
        ring = Ring(config._ring_mesh.get_group(), config._ring_local_rank, ranges, traffic)
    mesh = config._ulysses_mesh
    return Ulysses(mesh.get_group(), mesh.get_local_rank(), tuple(parts), traffic, ring)


def streams(transformer: nn.Module, grid: TokenGrid) -> tuple[int, int]:
    """Tokens of `IMAGE_TOKENS` and `TEXT_TOKENS` in a call, in all processes."""
    return (grid.tokens - grid.text, grid.text) if _separate(transformer) else (grid.tokens, 0)


def _separate(transformer: nn.Module) -> bool:
    """Whether text is shared apart from the image."""
    shared = shared_of(transformer)
    sharding = Sharding.of_class(transformer) if shared is None else shared.sharding
    assert sharding is not None  # `check` refuses a class without a plan
    return sharding.separate


def _shares_anything(transformer: nn.Module) -> bool:
    """Whether lengths and heads need not divide by the number of processes."""
    return shared_of(transformer) is not None or config_of(transformer).ulysses_anything  # type: ignore[union-attr]


def _shares_as_declared(transformer: nn.Module) -> bool:
    """Whether the model's sharding hooks are those of its class's `_cp_plan`."""
    hooked = set()
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            kind, _, pattern = hook.partition("---")
            if kind in ("cp_input", "cp_output"):
                hooked.add(pattern)
    plan: Any = getattr(transformer, "_cp_plan", None)
    return bool(plan) and hooked == set(plan)
