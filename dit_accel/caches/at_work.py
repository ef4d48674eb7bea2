"""A step cache at work in one transformer: put on, led from call to call, recorded, and taken off exactly."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.caches.hooking import PlacedHooks, present_cache
from dit_accel.caches.ratios import MagRatios, mag_ratios
from dit_accel.caches.record import BranchReport, CacheReport, size_of
from dit_accel.caches.step_cache import ChosenSteps, StepCache
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.pipelines.family import Family

if TYPE_CHECKING:
    from dit_accel.caches.listed_steps import ListedCall
    from dit_accel.caches.residuals import Add

BLOCK_CACHES = ("first-block", "mag", "steps")
# by the state of a call's branch: whether the cache skipped blocks; the others decide layer by layer
SKIPPED: dict[str, Callable[[Any], bool]] = {
    "first-block": lambda state: not state.should_compute,
    "mag": lambda state: not state.should_compute,
    "sea": lambda state: state.consecutive_cached > 0,
    "taylorseer": lambda state: state.last_update_step not in (None, state.current_step),
}
_OURS: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # transformers with a cache of this package


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is known of a call before it runs.

    Args:
        run: tells one run of the pipeline from another; None if nothing does.
        index: the step, counted from 0; None if unknown.
        count: steps of the run; None if unknown.
        timestep: in the scheduler's units, 0 to 1000; None if unknown.
        sigma: the scheduler's noise level; None if it has none.
        shape: of the call's latent.
    """

    run: Any = None
    index: int | None = None
    count: int | None = None
    timestep: float | None = None
    sigma: float | None = None
    shape: tuple[int, ...] = ()


class CacheAtWork:
    """Runs a step cache in one transformer.

    Args:
        name: of the transformer in its pipeline.
        cache: which, with settings.
        models: names of the pipeline and its transformer, by which published ratios are found.
        add_up: gives what sums a tensor over the processes that share a sequence; None without them.

    Raises:
        DitAccelError: the transformer has a cache already, or it cannot have this one.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        family: Family,
        cache: StepCache,
        models: tuple[str, ...] = (),
        add_up: Callable[[], Add | None] = lambda: None,
    ) -> None:
        self.name, self.cache = name, cache
        self._transformer, self._family, self._stack = transformer, family, family.stack_of(transformer)
        self._add_up, self._calibrate = add_up, bool(cache.config.get("calibrate"))
        self._ratios: MagRatios | None = None
        self._chosen: ChosenSteps | None = cache.build() if cache.name == "steps" else None
        self._listed: ListedCall | None = None  # of `_chosen`, while the cache is on
        self.notes: list[str] = []
        if cache.name == "mag":
            self._ratios = mag_ratios(cache.config.get("mag_ratios"), models)
            if "mag_ratios" not in cache.config and not self._calibrate:
                self.notes.append(f"mag_ratios: {self._ratios.source}")
        self._moment = Moment()
        self._number = 0
        self._branch = ""
        self._context: Any = None
        self._branches: dict[str, BranchReport] = {}
        self._kept_bytes = 0
        self._config: Any = None
        self._hooks: PlacedHooks | None = None
        self._hook_states: dict[str, list[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tables: dict[tuple[str, int], torch.Tensor] = {}
        self._calibration: dict[str, dict[int, float]] = {}  # by branch and step of the last run
        self._check()

    def _check(self) -> None:
        """Refuse a transformer that this cache cannot serve."""
        kind = type(self._transformer).__name__
        # that of an accelerator which this one replaces is gone before this one comes
        present = None if self._transformer in _OURS else present_cache(self._transformer)
        if present is not None:
            raise DitAccelError(
                f"{kind} already has a step cache ({present}), and it stays the user's. Call its disable_cache() "
                "first, or leave out cache=."
            )
        blocks = list(self._stack.blocks(self._transformer))
        lists = [name for name in self._stack.lists if not len(getattr(self._transformer, name, ()))]
        if self.cache.name in (*BLOCK_CACHES, "taylorseer") and (len(blocks) < 2 or lists):
            raise DitAccelError(
                f"{self.cache.name} skips the blocks of {' and '.join(self._stack.lists)}, and this {kind} has "
                f"{len(blocks)} of them{f', none in {lists[0]}' if lists else ''}. It needs two or more in every list."
            )

    @property
    def reads_noise(self) -> bool:
        """Whether the cache asks for timestep or noise level."""
        return self.cache.name in ("sea", "faster", "pab")

    @property
    def reads_ends_alone(self) -> bool:
        """Whether it reads what the first block takes and the last one returns, and nothing between those two."""
        return self.cache.name in BLOCK_CACHES or (
            self.cache.name == "taylorseer" and bool(self.cache.build().use_lite_mode)
        )

    @property
    def skips(self) -> bool:
        """Whether it is known before the call that its blocks are skipped."""
        return self._listed is not None and bool(self._branch) and not self._listed.computes

    def attach(self) -> None:
        """Put the cache on. An error takes everything off again."""
        self._check()
        self._hooks = placed = PlacedHooks(self._transformer)
        try:
            self._put()
        except BaseException:
            placed.collect()
            self.detach()
            raise
        placed.collect()
        if not placed.hooks:
            self.detach()
            raise DitAccelError(
                f"{self.cache} finds nothing to skip in {type(self._transformer).__name__}: Diffusers' cache looks for "
                "modules by name, and this model's have other names. Use first-block, mag, taylorseer or steps."
            )
        if hasattr(self._transformer, "_cache_config"):
            self._transformer._cache_config = self._config
        _OURS.add(self._transformer)

    def _put(self) -> None:
        config: Any
        if self.cache.name in BLOCK_CACHES:
            from dit_accel.caches import residuals

            if self._chosen is not None:
                self._listed = residuals.ListedCall(self._chosen)
            config = self.cache.build() if self.cache.name == "first-block" else self._mag_config()
            residuals.put(self._transformer, self._stack, config, self._add_up, self._listed)
        elif self.cache.name in ("taylorseer", "sea"):
            from dit_accel.caches import lookups

            put = lookups.put_sea if self.cache.name == "sea" else lookups.put_taylorseer
            config = put(self._transformer, self._stack, self.cache)
        else:
            from diffusers import hooks

            config = self.cache.build(current_timestep_callback=self._now)
            apply = hooks.apply_faster_cache if self.cache.name == "faster" else hooks.apply_pyramid_attention_broadcast
            apply(self._transformer, config)
        self._config = config

    def _mag_config(self) -> Any:
        """The config before the first run, which sets the number of steps.

        By that of a list of steps, which nothing reads, Diffusers' `disable_cache` knows which hooks to remove.
        """
        if self._ratios is None:
            return StepCache("mag").build(mag_ratios=[1.0], num_inference_steps=1)
        steps = self.cache.config.get("num_inference_steps", len(self._ratios.cond))
        return self.cache.build(mag_ratios=list(self._ratios.cond), num_inference_steps=steps)

    def detach(self) -> None:
        """Take the cache off: hooks, forwards and registries are as before."""
        if self._hooks is None:
            return
        self._hooks.remove()
        _OURS.discard(self._transformer)
        if self._config is not None and getattr(self._transformer, "_cache_config", None) is self._config:
            vars(self._transformer).pop("_cache_config", None)
        self._hooks, self._hook_states, self._context, self._listed, self._branch = None, {}, None, None, ""

    def resume(self) -> None:
        """Put the cache on again; if another one is there by now, it stays off and says so."""
        try:
            self.attach()
        except DitAccelError as error:
            self._note_gone(f"no longer on {self.name}: {str(error).removesuffix('.')}")

    @property
    def _managers(self) -> list[Any]:
        return [] if self._hooks is None else self._hooks.managers

    def begin(self, now: Moment) -> None:
        """Before a call: tell the cache its step and guidance branch; what another run kept is forgotten.

        Raises:
            DitAccelError: the step is unknown and nobody entered `cache_context`, or the run has another number of
                steps than the settings say.
        """
        if self._hooks is None:
            return
        if self._listed is not None:
            self._listed.end()
        if self._hooks.gone:
            self._branch = ""
            self._note_gone(f"no longer on {self.name}: it was taken off since, as disable_cache() does")
            return
        managers = self._managers
        context = managers[0]._context if managers else None
        theirs = None if context is self._context else context
        if now.index is None and (theirs is None or self._listed is not None):
            enter = ", or enter transformer.cache_context(name)" if self._listed is None else ""
            raise DitAccelError(
                f"{self.cache.name} needs the step of each call, and nothing tells it. Accelerate the pipeline, or "
                f"call set_step(i, n) before the call{enter}."
            )
        before, self._moment = self._moment, now
        if now.index is not None:
            anew = before.index is None or now.index < before.index
            if anew or now.run is not before.run or now.count != before.count:
                self._reset()
                self._calibration.clear()
                self._prepare(now)
                before = Moment()
            self._number = self._number + 1 if before.index == now.index else 0
        self._branch = f"call {self._number}" if theirs is None else str(theirs.name)
        self._enter(managers, theirs)
        if self._shapes.setdefault(self._branch, now.shape) != now.shape:
            self._forget(self._branch)
            self._shapes[self._branch] = now.shape
        if now.index is not None and self._listed is not None:
            self._listed.begin(managers[0].get_state(), now.index)
        elif self.cache.name in BLOCK_CACHES:
            state = managers[0].get_state()
            state.should_compute, state.head_ran = True, False  # the first block may not run, as in skip-layer guidance
            if now.index is not None and self.cache.name == "mag":
                self._lead_mag(state, now)

    def _note_gone(self, note: str) -> None:
        """Say once that the cache is at work no longer."""
        if note in self.notes:
            return
        self.notes.append(note)
        warnings.warn(
            f"The step cache {self.cache} is {note}. Call accelerate(..., replace=True) to put it on again.",
            DitAccelWarning,
            stacklevel=2,
        )

    def _prepare(self, now: Moment) -> None:
        """Take the number of steps of a new run, and refuse a run that the cache is not for."""
        if self._chosen is not None:
            self._chosen.check(now.count)
        if self.cache.name == "faster" and not self._config.is_guidance_distilled and now.shape and now.shape[0] % 2:
            raise DitAccelError(
                f"faster takes calls whose second half of the batch is guided; this one has {now.shape[0]} samples. "
                "Without guidance, or with a call for each guidance branch, add is_guidance_distilled=true."
            )
        if self.cache.name != "mag" or self._calibrate:
            return
        steps = self.cache.config.get("num_inference_steps")
        if steps is not None and now.count is not None and steps != now.count:
            raise DitAccelError(
                f"mag has num_inference_steps={steps}, and this run has {now.count}. Leave the setting out: it follows "
                "the scheduler."
            )
        if steps is None and now.count is None:
            raise DitAccelError(
                "mag needs the number of steps, and a transformer alone does not have it. Accelerate the pipeline, "
                "call set_step(i, n), or set num_inference_steps."
            )

    def _lead_mag(self, state: Any, now: Moment) -> None:
        """Set MagCache's step and ratios: a branch may be absent in some steps, and begin in the middle (Wan 2.2)."""
        assert now.index is not None
        state.step_index = now.index
        assert self._ratios is not None
        steps = now.count or self.cache.config["num_inference_steps"]
        # one more than there are: at the last, Diffusers would print a calibration and forget it
        self._config.num_inference_steps = steps + 1 if self._calibrate else steps
        if not self._calibrate:
            key = self._branch, steps
            if key not in self._tables:
                ratios = list(self._ratios.of(self._branch))
                self._tables[key] = self.cache.build(mag_ratios=ratios, num_inference_steps=steps).mag_ratios
            self._config.mag_ratios = self._tables[key]

    def _enter(self, managers: list[Any], context: Any) -> None:
        """Enter our context, or complete the pipeline's; swap the states of hooks that know no contexts."""
        from diffusers.hooks.hooks import CacheContext

        now = self._moment
        told: dict[str, Any] = {"step_index": now.index, "num_inference_steps": now.count}
        told |= {"timestep": now.timestep, "sigma": now.sigma}
        if context is None:
            context = self._context = CacheContext(self._branch, **told)
        else:
            missing = {name: value for name, value in told.items() if getattr(context, name) is None}
            context = dataclasses.replace(context, **missing)
        for manager in managers:
            manager.set_context(context)
        plain = [] if self._hooks is None else self._hooks.stateful
        if plain:
            states = self._hook_states.setdefault(self._branch, [type(hook.state)() for hook in plain])
            for hook, state in zip(plain, states, strict=True):
                hook.state = state

    def _skipped(self) -> bool | None:
        """Whether the cache skipped blocks in the call that ends; None: it decides layer by layer."""
        if self._listed is not None:
            return self._listed.answered
        if self.cache.name not in SKIPPED:
            return None
        states = [manager._state_cache.get(self._branch) for manager in self._managers]
        return any(SKIPPED[self.cache.name](state) for state in states if state is not None)

    def count(self, ran: int, layers: int) -> None:
        """After a call: record it, and that so many of these self-attention layers ran.

        A layer may not run for another reason than the cache, such as skip-layer guidance.
        """
        skipped = self._skipped()
        if self._listed is not None:
            self._listed.end()
        if not self._branch:
            return
        skipped = ran < layers if skipped is None else skipped
        report = self._branches.setdefault(self._branch, BranchReport(self.name, self._branch))
        index = self._moment.index
        if index is not None and any(step is not None and step > index for step in report.steps):
            report.steps = {}
        report.skipped += skipped
        report.computed += not skipped
        report.steps[index] = ran / max(layers, 1) if skipped else 1.0
        self._kept_bytes = max(self._kept_bytes, self.size)
        if self._calibrate and index is not None:
            if ratios := self._managers[0]._state_cache[self._branch].calibration_ratios:
                self._calibration.setdefault(self._branch, {})[index] = ratios[-1]
        if index is not None and self._moment.count is not None and index + 1 >= self._moment.count:
            self._forget(self._branch)

    @property
    def size(self) -> int:
        """Bytes that the cache holds now."""
        states = [vars(state) for manager in self._managers for state in manager._state_cache.values()]
        return size_of([*states, *(vars(state) for row in self._hook_states.values() for state in row)])

    def report(self) -> CacheReport:
        """What it did so far."""
        ratios: dict[str, Any] = {}
        if self._calibrate:
            last = max((max(steps) for steps in self._calibration.values()), default=-1)
            rows = {name: [steps.get(i) for i in range(last + 1)] for name, steps in self._calibration.items()}
            ratios = {self.name: rows}
        return CacheReport(str(self.cache), list(self._branches.values()), self._kept_bytes, list(self.notes), ratios)

    def _reset(self) -> None:
        for branch in {*self._branches, *self._shapes, *self._hook_states}:
            self._forget(branch)
        for manager in self._managers:
            manager._state_cache.clear()
        self._shapes.clear()
        self._hook_states.clear()

    def _forget(self, branch: str) -> None:
        """Free what a branch kept. The hooks' present states go too: they are those of the branch."""
        for manager in self._managers:
            manager._state_cache.pop(branch, None)
        for state in self._hook_states.get(branch, ()):
            state.reset()

    def _now(self) -> float:
        """The timestep, for caches that ask."""
        if self._moment.timestep is None:
            raise DitAccelError(
                f"{self.cache.name} needs the timestep. Accelerate the pipeline, whose scheduler has it."
            )
        return self._moment.timestep
