"""One accelerated self-attention layer: its processors, its learned weights and its part of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.hooks import selfcheck
from dit_accel.hooks.report import LayerReport, Tally
from dit_accel.method import LearnedModule
from dit_accel.pipelines.attention import CallState
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.processor import AcceleratedAttnProcessor, wrap_processor
from dit_accel.plans import ramps
from dit_accel.plans.plan import Plan, building
from dit_accel.plans.routed import RoutedPlan
from dit_accel.setting import Setting


@dataclasses.dataclass
class AcceleratedLayer:
    """One self-attention module.

    Attributes:
        name: dotted path of `attention` in its transformer.
        config: the method's settings; unused with a `dense_reason`.
        dense_reason: why the layer stays dense in every call, or None.
        sees_text: as in `Family.sees_text`.
        original, ours: the model's own processor, and ours around it.
        attribute: name of the learned weights on `attention`.
        measured: what the self-check found, as in `selfcheck.Measured.sums`, on its device until the report reads it.
    """

    name: str
    attention: nn.Module
    config: Any
    dense_reason: str | None
    sees_text: bool
    original: Any
    ours: AcceleratedAttnProcessor
    tally: Tally = dataclasses.field(default_factory=Tally)
    attribute: str | None = None
    learned: nn.Module | None = None
    measured: torch.Tensor | None = None
    attached: bool = False

    def attach(self, module: LearnedModule | None, channels: int, head_dim: int, heads: int) -> None:
        """Set our processor, and new learned weights as an attribute of the attention module."""
        if module is not None:
            if hasattr(self.attention, module.attribute):
                raise DitAccelError(f"{self.name} already has a module named {module.attribute!r}; remove it first.")
            device = next(self.attention.parameters()).device
            with building():
                learned = module.build(channels, head_dim, heads, ramps.at(self.config))
                if device.type != "meta":  # where offloaded weights are between calls
                    learned.to(device)
            self.attention.add_module(module.attribute, learned)
            self.attribute, self.learned = module.attribute, learned
        self.ours.take_learned(self.learned)
        self.attention.processor = self.ours  # type: ignore[assignment]
        self.attached = True

    def detach(self) -> bool:
        """Undo `attach`; False if another processor was set since, which stays."""
        self.adopt()
        if self.attribute is not None and getattr(self.attention, self.attribute, None) is self.learned:
            delattr(self.attention, self.attribute)
        if self.attention.processor is self.ours:
            self.ours.settle()
            self.attention.processor = self.original
        self.ours.stored.clear()
        self.ours.watch, self.attached = None, False
        return self.attention.processor is self.original

    def adopt(self) -> None:
        """Put our processor back where Diffusers has set another object of its class, made without arguments.

        Loading an IP-Adapter calls `processor.__class__()` for the layers that carry none.
        """
        current: Any = self.attention.processor
        if current is not self.ours and isinstance(current, type(self.ours)) and current.unbound:
            self.attention.processor = self.ours  # type: ignore[assignment]

    def drop_kept(self, step: int) -> None:
        """Free what no call takes from this step on: what an earlier run kept, or a step too long ago."""
        refresh = 0 if self.config is None else ramps.at(self.config).refresh
        stored = self.ours.stored
        for number in [number for number, entry in stored.items() if not 0 <= step - entry.step < refresh]:
            del stored[number]

    def measure_density(self, device: torch.device | None) -> None:
        """Let plans whose calls differ add their densities to a sum on a device; None: no such plan."""
        density_sum = self.ours.density_sum
        if device is None:
            self.ours.density_sum = None
        elif density_sum is None or density_sum.device != device:
            with torch.inference_mode(False):
                self.ours.density_sum = torch.zeros(2, device=device)

    def count(self, last: tuple[Plan, str, str] | str, step: int | None) -> None:
        """Add a call that ran to the tally.

        Args:
            last: its plan, implementation and the reason for it, or why it was dense.
            step: of the call; None if unknown.
        """
        self.tally.keep(self.ours.stored)
        if self.ours.intercepted:
            last = "attention replaced by a function mode"
        self.ours.ran = self.ours.intercepted = False
        if isinstance(last, str):
            self.tally.dense(last)
            return
        plan, kernel, why = last
        self.tally.sparse(plan.density, kernel, why, step if isinstance(self.config, ramps.Ramped) else None)
        if isinstance(plan, RoutedPlan) and plan.curve is not None:
            self.tally.permuted("stack" if self.ours.arranged else "layer")
        if self.ours.density_sum is not None:
            self.tally.measure(step, self.ours.density_sum)

    def report(self, transformer: str) -> LayerReport:
        error, mass = (None, None) if self.measured is None else selfcheck.whole(self.measured)
        counted = self.tally.totals()
        return LayerReport(transformer, self.name, **counted, left=self.left, relative_error=error, kept_mass=mass)

    @property
    def kind(self) -> tuple[Any, bool]:
        """Layers of one kind share a `CallState`."""
        return self.config, self.sees_text

    @property
    def left(self) -> str | None:
        """Class of the processor that replaced ours, or None."""
        current = self.attention.processor
        if current is self.ours or (current is self.original and not self.attached):
            return None
        return type(current).__name__


def find_layers(
    name: str,
    transformer: nn.Module,
    family: Family,
    setting: Setting,
    state: Callable[[Any, str | None, bool], CallState],
) -> list[AcceleratedLayer]:
    """The layers of a transformer with our processors, not yet set: an error leaves the model unchanged.

    Args:
        name: of the transformer in its pipeline.
        state: of a layer, by its settings, why it stays dense, and whether it sees text.
    """
    attentions = list(family.attentions(transformer))
    if not attentions:
        raise DitAccelError(
            f"{type(transformer).__name__} has no module named {' or '.join(family.attention)}, where the family "
            f"{family.name} has its self-attention. Use an unmodified model of the family."
        )
    layers = []
    by_layer = setting.by_layer(name, len(attentions))
    for (path, attention), (config, reason) in zip(attentions, by_layer, strict=True):
        sees_text = family.sees_text(path)
        original: Any = attention.processor
        if isinstance(original, AcceleratedAttnProcessor):  # set by an accelerator that this one replaces
            if original.copied:
                raise copy_error(transformer)
            original.settle()
            original = original.inner
        ours = wrap_processor(original, state(config, reason, sees_text), family.sparse_calls)
        layers.append(AcceleratedLayer(path, attention, config, reason, sees_text, original, ours))
    return layers


def copy_error(transformer: nn.Module) -> DitAccelError:
    """The error about a copy of an accelerated transformer."""
    return DitAccelError(
        f"This {type(transformer).__name__} is a copy of an accelerated one and would follow the original's calls. "
        "Call remove() before copying, or copy first and accelerate the copy."
    )


@torch.compiler.assume_constant_result
def refuse_export(name: str) -> None:
    """Dynamo calls such a function, and lets its error out as it is, instead of tracing it."""
    raise DitAccelError(
        f"An exported {name} attends as in its last call, and there was none. Call it with the same inputs, then "
        "export it."
    )
