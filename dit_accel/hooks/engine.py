"""A method at work in one transformer: its processors, the hook before each call, and the count of calls."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dit_accel.caches.at_work import CacheAtWork
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.hooks.accelerated_layer import (
    AcceleratedLayer,
    copy_error,
    find_layers,
    refuse_export,
)
from dit_accel.hooks.arranged_stack import ArrangedStack
from dit_accel.hooks.dense_backend import DenseBackend
from dit_accel.hooks.levels import Level
from dit_accel.hooks.plan_cache import PlanCache
from dit_accel.hooks.selfcheck import SelfCheck, Watching
from dit_accel.hooks.several import Several
from dit_accel.hooks.state_methods import StateMethods
from dit_accel.hooks.steps import StepClock
from dit_accel.kernels.impls import Impl
from dit_accel.method import Method
from dit_accel.pipelines.anchors import AnchorTokens
from dit_accel.pipelines.attention import AtWork, CallState
from dit_accel.pipelines.family import Family, Memory, ModelInputs
from dit_accel.plans import ramps
from dit_accel.plans.plan import Plan
from dit_accel.plans.ramps import Ramped
from dit_accel.plans.routed import RoutedPlan
from dit_accel.schedule import Step
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid


class Engine(AtWork):
    """Runs a method in one transformer.

    Args:
        name: of the transformer in its pipeline.
        setting: of every layer and step.
        clock, plans: shared by the transformers of a pipeline.
        impl, check: as in `accelerate`.

    Attributes:
        watchers: functions called with every sparse attention call.
        cache: the step cache of this transformer; None without one.
        level: the level that the setting comes from; None without one.
        several: the processes that share the tokens.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        family: Family,
        method: Method,
        setting: Setting,
        clock: StepClock,
        plans: PlanCache,
        impl: Impl,
        check: SelfCheck,
    ) -> None:
        self.name, self.calls, self.paused = name, 0, False
        self.notes: list[str] = [] if method.note is None else [method.note]
        self._transformer, self._family = transformer, family
        self._method, self._impl = method, impl
        self._schedule, self._clock, self._plans = setting.schedule, clock, plans
        self._signature = inspect.signature(type(transformer).forward)
        self._memory = Memory()
        self._step: Step | None = None
        self._number = 0  # of the call within its step
        self._run: Any = None  # what tells one run of the pipeline from another
        self._compiled = self._warned = False
        # of the last call, by kind of layer: plan, implementation and the reason for it, or why the call was dense
        self._last: dict[Any, tuple[Plan, str, str] | str] = {}
        self._replaced: list[tuple[AcceleratedLayer, str]] = []  # of this call, with the class that runs instead
        self._omitted: tuple[str, ...] = ()  # masks among the last call's arguments
        self._handles: list[Any] = []
        self._owner: object = None
        # layers with the same settings share a state, so a compiled model has one graph for each setting
        self._states: dict[tuple[Any, bool], CallState] = {}
        self._dense_states = {sees: CallState(impl, family.text_is_keys) for sees in (True, False)}
        self._watching = Watching(name, check, family.heads, self._dense_states)
        self.watchers = self._watching.watchers
        self.layers = find_layers(name, transformer, family, setting, self._state)
        anchored = any(ramps.at(config).anchors for config, _ in self._states)
        self._by_step = self._schedule.by_step or any(isinstance(config, Ramped) for config, _ in self._states)
        self._anchors = AnchorTokens(transformer, family) if anchored else None
        device = torch.device(clock.execution_device or next(transformer.parameters()).device)
        self._dense_backend = DenseBackend(setting.dense_backend, device, self.layers)
        heads = family.heads(self.layers[0].attention)
        self.several = Several(transformer, family, heads, setting.dense_backend, impl)
        check.refuse_shared(ramps.at(layer.config) for layer in self.layers if layer.config is not None)
        self.level: Level | None = None
        self.siblings: Sequence[Engine] = (self,)  # of the transformers that take the steps of a run in turn
        self.cache: CacheAtWork | None = None
        if setting.cache is not None:
            sources = clock.pipeline_config, getattr(transformer, "config", None)
            models = tuple(str(getattr(source, "_name_or_path", "")) for source in sources)
            self.cache = CacheAtWork(name, transformer, family, setting.cache, models, self.several.add_up)
        self._arranged = ArrangedStack(transformer, family, self.layers, self.cache)
        self._state_methods = StateMethods(transformer)

    def _state(self, config: Any, reason: str | None, sees_text: bool) -> CallState:
        """The state of a layer."""
        if reason is not None:
            return self._dense_states[sees_text]
        return self._states.setdefault((config, sees_text), CallState(self._impl, self._family.text_is_keys))

    @property
    def all_notes(self) -> list[str]:
        return [*self.notes, *self._dense_backend.notes, *self._arranged.notes]

    def attach(self, owner: object) -> None:
        """Set our processors, add learned weights and hook the transformer. The hooks keep `owner` alive."""
        self.several.check()
        self._owner = owner
        self._dense_backend.set()
        for layer in self.layers:
            module = None if layer.dense_reason is not None else self._method.learned(ramps.at(layer.config))
            attention, family = layer.attention, self._family
            layer.attach(module, family.channels(attention), family.head_dim(attention), family.heads(attention))
        if self._method.module is not None:
            self._state_methods.set()
        # Dynamo traces the first hook of a compiled transformer, which shows that it is compiled, and not the second.
        self._handles = [
            self._transformer.register_forward_pre_hook(self._note_compiled),
            self._transformer.register_forward_pre_hook(self._make_hook(), with_kwargs=True),
            *(() if self._anchors is None else self._anchors.attach()),
            *self._arranged.attach(),
        ]
        if self.cache is not None:
            self.cache.attach()
        if self.cache is not None or self._watching.unchecked:
            self._handles.append(self._transformer.register_forward_hook(self._make_after()))

    def pause(self, paused: bool) -> None:
        """Run the model's own attention in every step until further notice; what a cache kept is forgotten."""
        before, self.paused = self.paused, paused
        if paused != before and self._owner is not None:  # `detach` has taken off both
            if self.cache is not None:
                (self.cache.detach if paused else self.cache.resume)()
            (self._dense_backend.undo if paused else self._dense_backend.set)()

    def detach(self) -> list[str]:
        """Undo `attach`; return the modules that keep another processor."""
        self.count_last_call()
        self.several.end()
        if self.cache is not None:
            self.cache.detach()
        for handle in self._handles:
            handle.remove()
        self._handles, self._owner = [], None
        self._dense_backend.undo()
        self._state_methods.undo()
        self._arranged.end()
        for state in (*self._states.values(), *self._dense_states.values()):
            state.end()  # somebody may set our processors again: they run the model's own
        self._last = dict.fromkeys(self._states, "removed")
        return [f"{self.name}.{layer.name}" for layer in self.layers if not layer.detach()]

    def count_last_call(self) -> None:
        """Add the layers that ran in the last call to their tallies."""
        for layer, processor_name in self._replaced:
            layer.tally.dense(f"ran {processor_name}")
        self._replaced = []
        for layer in self.layers:
            if not layer.ours.ran:
                continue
            last = layer.dense_reason or self._last.get(layer.kind, "not called yet")
            layer.count(last, None if self._step is None else self._step.index)

    def _look_for_dropped(self) -> None:
        """Warn once about layers whose processor was replaced since `attach`: they run dense."""
        for layer in self.layers:
            layer.adopt()
        self._replaced = [(layer, layer.left) for layer in self.layers if layer.left is not None]
        dropped = [name for _, name in self._replaced]
        self.several.refuse_dropped(dropped)
        if dropped and not self._warned and self._states:
            warnings.warn(
                f"{len(dropped)} of {len(self.layers)} accelerated layers of {type(self._transformer).__name__} run "
                f"{', '.join(sorted(set(dropped)))}, set after accelerate(), and are dense. If you have set them, call "
                "accelerate(..., replace=True) to accelerate them again, or remove() to accept that. A pipeline that "
                "sets its own in every call, as with perturbed-attention guidance, runs these layers dense.",
                DitAccelWarning,
                stacklevel=2,
            )
        self._warned = bool(dropped)

    def _note_compiled(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._compiled = torch.compiler.is_compiling()

    def _make_hook(self) -> Callable[..., Any]:
        """`_before_call`, untraced; in an export, whose tensors have no values to decide by, the last decision."""
        outside = torch.compiler.disable(self._before_call)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.compiler.is_exporting() or not self._states or module is not self._transformer:
                return outside(module, args, kwargs)
            if not self._last:
                refuse_export(type(module).__name__)
            return self._omit_masks(args, kwargs)

        return _without_graph(hook)

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide how the layers of this call attend; return its arguments if they change."""
        if module is not self._transformer:
            raise copy_error(module)
        self.count_last_call()
        self._arranged.end()
        self._watching.checking = False
        self.calls += 1
        self._look_for_dropped()
        self._dense_backend.check(self._any_compiled)
        self._omitted = ()
        if self.level is not None and not self.paused:
            call = ModelInputs(self._signature, module, args, kwargs, self._memory)
            self.level.check(module, self._family, call, self._clock)
        if self.cache is not None:
            cached = ModelInputs(self._signature, module, args, kwargs, self._memory)
            self.cache.begin(self._clock.moment(self._family.timestep(cached), cached.shape, self.cache.reads_noise))
        states = [(sees_text, state) for (_, sees_text), state in self._states.items()]
        for _, state in states:
            state.sparse = False
        model_alone = self.paused or not self._states
        if model_alone:
            self._last = dict.fromkeys(self._states, "paused")
            if not self.several.attends:
                return None
        self.several.check()
        call = ModelInputs(self._signature, module, args, kwargs, self._memory)
        with torch.device("cpu"):  # masks and ids are read there, whatever the caller's default device
            layout = self._family.layout(module, call)
        self.several.begin(layout)
        self.several.attend_densely(layout, self._dense_states.items())
        if model_alone:
            self.several.attend_densely(layout, states)
            return None
        now = self._now(call, "A step schedule") if self._by_step else None
        plans = {kind: self._plan(kind, layout.grid, call.device, now) for kind in self._states}
        self.notes += [note for note in layout.notes if note not in self.notes]
        reason = None if now is None else self._schedule.dense_step(now)
        self._remark(None if now is None else now.count)
        if reason is not None:
            self._last = dict.fromkeys(self._states, reason)
            for layer in self.layers:  # first steps have nothing of this run yet, and last steps need nothing more
                layer.ours.stored.clear()
            self.several.attend_densely(layout, states)
            return None
        # without a scheduler only the timestep's value tells the step, and reading it waits for the device
        told = bool(self.watchers) or not self._clock.reads_values
        if now is None and told:
            now = self._clock.now_if_told(self._family.timestep(call))
        before, self._step = self._step, now
        if any(ramps.at(config).refresh > 1 for config, _ in self._states):
            self._count_in_step(call, before)
        for (config, sees_text), state in self._states.items():
            plan = plans[config, sees_text]
            shared = self.several.sharing(plan, layout, self._watching.listening)
            self._last[config, sees_text] = last = self.several.computed(shared, self._prepare(plan, call.device))
            self._measure_densities(plan, (config, sees_text), call.device)
            text = (layout.text_lens, layout.text_bias, layout.rows) if sees_text else (None, None, None)
            segments = layout.segments if sees_text else ()
            state.set(plan, *text, segments, ulysses=shared)
            _, state.impl, _ = last
        if self.cache is None or not self.cache.skips:
            self._arranged.begin(layout, call.device, self._last)
        if any(state.sparse for state in self._states.values()):
            self._watch_layers()
            if self._anchors is not None:
                return (), self._anchors.add(call, layout, list(plans.values()), self._compiled)
        ours = all(layer.dense_reason is None and layer.attention.processor is layer.ours for layer in self.layers)
        if ours and not self._watching.checking and all(state.sparse for state in self._states.values()):
            self._omitted = layout.masks  # no processor of this call reads them
        return self._omit_masks(args, kwargs)

    def _make_after(self) -> Callable[..., None]:
        """`_after_call`, untraced."""
        outside = torch.compiler.disable(self._after_call)
        return _without_graph(lambda module, args, output: outside())

    def _after_call(self) -> None:
        """End the check of the layers, record what the step cache skipped, free what skipped layers keep at the end."""
        self._watching.end()
        if self.cache is None:
            if not self._watching.unchecked:
                self._handles.pop().remove()  # of this hook, which nothing needs from now on
            return
        if not self.paused:
            ran = [layer.ours.ran for layer in self.layers if layer.left is None]
            self.cache.count(sum(ran), len(ran))
        self.count_last_call()
        step = self._step
        if step is not None and step.count is not None and step.index + 1 >= step.count:
            for layer in self.layers:
                layer.ours.stored.pop(self._number, None)

    def _omit_masks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._omitted:
            return None
        return args, {name: None if name in self._omitted else value for name, value in kwargs.items()}

    def _measure_densities(self, plan: Plan, kind: tuple[Any, bool], device: torch.device) -> None:
        """Give the layers of a kind a sum on the device, to which a plan whose calls differ adds each density."""
        if isinstance(plan, RoutedPlan):
            plan.block_sizes(device)
        varies = isinstance(plan, RoutedPlan) or plan.config.share != "none"
        for layer in self.layers:
            if layer.kind == kind:
                layer.measure_density(device if varies else None)

    def _watch_layers(self) -> None:
        """Have the layers of this call report what they compute to the self-check and the watchers, if any."""
        if self._watching.listening and self._any_compiled():
            raise DitAccelError(
                f"This {type(self._transformer).__name__} is compiled, and compiled attention calls can neither be "
                "watched nor checked. Call it once with verify='first-call' before compiling it."
            )
        self._watching.begin(self.layers, self._step)

    def _any_compiled(self) -> bool:
        """Whether the transformer or a part of it is compiled."""
        parts = (getattr(module, "_compiled_call_impl", None) for module in self._transformer.modules())
        return self._compiled or any(parts)

    def _prepare(self, plan: Plan, device: torch.device) -> tuple[Plan, str, str]:
        """The plan, its implementation and the reason for it."""
        head_dim, learned = self._family.head_dim(self.layers[0].attention), self._method.learned(plan.config)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        else:
            dtype = self._transformer.dtype  # type: ignore[assignment]  # a weight may be stored in float8
        return plan, *plan.prepare(device, dtype, head_dim, self._impl, learned=learned is not None)

    def _remark(self, steps: int | None) -> None:
        """Say once if a schedule leaves other dense steps of a run than its shares ask for, or no sparse ones."""
        remark = None if steps is None else self._schedule.remark(steps)
        if remark is not None and remark not in self.notes:
            self.notes.append(remark)
            warnings.warn(f"{remark}.", DitAccelWarning, stacklevel=2)

    def _plan(self, kind: tuple[Any, bool], grid: TokenGrid, device: torch.device, now: Step | None) -> Plan:
        """The plan of a kind of layer in a step on a grid."""
        config, sees_text = kind
        place = 0.0
        if isinstance(config, Ramped) and now is not None:
            place = self._schedule.place(now, config.first.refresh)
        seen = grid if sees_text else dataclasses.replace(grid, text=0, conditioning=0)
        return self._plans.get(config, seen, device, place)

    def _now(self, call: ModelInputs, what: str) -> Step:
        if self._compiled and self._clock.reads_values:
            raise DitAccelError(
                f"{what} on a compiled transformer without its pipeline needs set_step(i, n) before each step. "
                "Reading the timestep would stop the device at every call. Call it, or accelerate the pipeline."
            )
        return self._clock.now(self._family.timestep(call))

    def _count_in_step(self, call: ModelInputs, before: Step | None) -> None:
        """Tell the layers the step and the number of the call within it; what another run kept is forgotten."""
        self._step = step = self._now(call, "refresh")
        last_run, self._run = self._run, self._clock.run
        if before is None or last_run is not self._run or before.count != step.count or before.index > step.index:
            before = None
            for layer in self.layers:
                layer.ours.stored.clear()
        self._number = self._number + 1 if before is not None and before.index == step.index else 0
        if not self._number:
            for layer in itertools.chain.from_iterable(engine.layers for engine in self.siblings):
                layer.drop_kept(step.index)
        last = step.count is not None and step.index + 1 >= step.count
        last = last and not torch.is_grad_enabled()  # else a backward pass may recompute the call
        for state in self._states.values():
            state.step = step.index, self._number, last


def _without_graph(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which gets no graph of its own; strict export still traces it as a part of the call."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(hook.__code__)
    return hook
