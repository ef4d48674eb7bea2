"""An engine's transformer when several processes share its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.hooks.dense_backend import AUTO8
from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.pipelines import context_parallel
from dit_accel.pipelines.attention import CallState
from dit_accel.pipelines.family import CallLayout, Family
from dit_accel.pipelines.sharding import shared_of
from dit_accel.plans.plan import Plan, building
from dit_accel.registry import DENSE, plan
from dit_accel.tokens import TokenGrid

PORTABLE: Impl = "portable"


class Several:
    """The processes that share a transformer's tokens.

    After `parallelize` the model's own attention would see one process's tokens alone. Dense layers and steps then
    compute the plan of the method "dense" between the processes.

    Args:
        transformer, family: the engine's.
        heads: of an attention layer.
        dense_backend: the setting of the dense layers' own attention; None without one.
        impl: as in `accelerate`.

    Attributes:
        traffic: what this process has exchanged in attention calls.
    """

    def __init__(
        self, transformer: nn.Module, family: Family, heads: int, dense_backend: str | None, impl: Impl
    ) -> None:
        self._transformer, self._family, self._heads = transformer, family, heads
        self._backend, self._impl = dense_backend, impl
        self._checked: Any | None = None
        self._plans: dict[TokenGrid, Plan] = {}
        self.traffic = context_parallel.Traffic()

    @property
    def attends(self) -> bool:
        """Whether dense layers attend here and not in the model's own processors."""
        return shared_of(self._transformer) is not None

    def check(self) -> None:
        """Refuse a way to share the tokens with which no call can run."""
        config = context_parallel.config_of(self._transformer)
        if config is self._checked:
            return
        context_parallel.check(self._transformer, self._heads)
        if self.attends and self._backend is not None:
            raise DitAccelError(
                f"dense_backend={self._backend} sets the model's own attention, which parallelize() replaces. Leave "
                "dense_backend out."
            )
        if config is not None and self._backend == AUTO8:
            raise DitAccelError(
                f"dense_backend={AUTO8} lets each process choose, and processes that share tokens must attend alike. "
                "Name one back end, or leave dense_backend out."
            )
        self._checked = config

    def add_up(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Sums a tensor over the processes that share a sequence; None without them."""
        config = context_parallel.config_of(self._transformer)
        return None if config is None else context_parallel.Ulysses(config._flattened_mesh.get_group(), 0, ()).add_up

    def sharing(self, plan: Plan, layout: CallLayout, watched: bool = False) -> context_parallel.Ulysses | None:
        """How the sequence of a call with this plan is shared; None if one process holds it all.

        Raises:
            DitAccelError: the call cannot run in a ring. `watched` ones cannot: no process sees q, k and v whole.
        """
        shared = context_parallel.sharing(self._transformer, plan.grid, self.traffic)
        if shared is None or shared.ring is None:
            return shared
        obstacles = {
            plan.needs_whole or "": True,
            "its sequence is not in the order of its grid": layout.rows is not None,
            "its mask adds a bias to text": layout.text_bias is not None,
            "its text has keys and no queries": self._family.text_is_keys,
            "verify and watchers compare whole sequences": watched,
        }
        reason = next((text for text, holds in obstacles.items() if text and holds), None)
        if reason is not None:
            raise DitAccelError(
                f"{plan.method} cannot run {type(self._transformer).__name__} in a ring, where each process holds a "
                f"range of the sequence: {reason}. Call parallelize(pipe) without ring."
            )
        return shared

    def computed(
        self, shared: context_parallel.Ulysses | None, prepared: tuple[Plan, str, str]
    ) -> tuple[Plan, str, str]:
        """The plan of a call, the implementation that computes it, and the reason for it.

        Args:
            shared: from `sharing`.
            prepared: the same without several processes.

        Raises:
            DitAccelError: an implementation is asked for that cannot attend between ranges of a ring.
        """
        if shared is None or shared.ring is None:
            return prepared
        if self._impl not in (AUTO, PORTABLE):
            raise DitAccelError(
                f"In a ring impl='portable' is the one that attends to ranges, not {self._impl!r}. Leave impl out."
            )
        return prepared[0], PORTABLE, "it attends to ranges of tokens"

    def begin(self, layout: CallLayout) -> None:
        """Tell the hooks how many tokens the call has."""
        shared = shared_of(self._transformer)
        if shared is not None:
            shared.tokens = context_parallel.streams(self._transformer, layout.grid)

    def end(self) -> None:
        """Refuse calls from now on: nobody computes the attention between the processes."""
        shared = shared_of(self._transformer)
        if shared is not None:
            shared.tokens = None

    def attend_densely(self, layout: CallLayout, states: Iterable[tuple[bool, CallState]]) -> None:
        """Have these states, each with whether its layers see text, compute the call under way densely."""
        if not self.attends:
            return
        for sees_text, state in states:
            grid = layout.grid if sees_text else dataclasses.replace(layout.grid, text=0, conditioning=0)
            if grid not in self._plans:
                with building():
                    self._plans = {**dict(list(self._plans.items())[-3:]), grid: plan(DENSE, grid)}
            text = (layout.text_lens, layout.text_bias, layout.rows) if sees_text else (None, None, None)
            dense = self._plans[grid]
            state.set(dense, *text, ulysses=self.sharing(dense, layout), dense=True)
            state.impl = AUTO

    def refuse_dropped(self, names: Iterable[str]) -> None:
        """Refuse processors that somebody set after `accelerate`: they see one process's tokens."""
        dropped = sorted(set(names))
        if self.attends and dropped:
            raise DitAccelError(
                f"After parallelize() every layer needs accelerate()'s processor, and {', '.join(dropped)} was set "
                "since. Call accelerate(..., replace=True)."
            )
