"""The library's public functions: accelerate a pipeline, report what ran, undo it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora as adapters
from dit_accel.checkpoint.lora import Trained
from dit_accel.errors import DitAccelError
from dit_accel.hooks import layers as layerwise
from dit_accel.hooks.engine import Engine
from dit_accel.hooks.layers import LayerSettings
from dit_accel.hooks.plan_cache import PlanCache
from dit_accel.hooks.report import Report
from dit_accel.hooks.schedule import Amount, Schedule
from dit_accel.hooks.selfcheck import AttentionCall, SelfCheck, Verify
from dit_accel.hooks.steps import StepClock
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Impl
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import Method, get_method, plain, settings_of

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Accelerator]] = weakref.WeakKeyDictionary()


class Accelerator:
    """A method at work in the transformers of a pipeline; `accelerate` makes it, `remove` or a with block undoes it.

    Attributes:
        method: name.
        config: the method's settings, a frozen dataclass; `LayerSettings` where every layer has its own.
        schedule, impl, allow_dense: as `accelerate` was asked for.
        transformers: by component name.
        trained: the fine-tuning at work besides the method's own weights; None without one.
    """

    def __init__(
        self,
        transformers: dict[str, tuple[nn.Module, Family]],
        pipeline: Any | None,
        method: Method,
        config: Any,
        schedule: Schedule,
        impl: Impl,
        allow_dense: bool,
        check: SelfCheck,
        dense_backend: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.method, self.config, self.schedule = method.name, config, schedule
        self.impl, self.allow_dense = impl, allow_dense
        self.transformers = {name: transformer for name, (transformer, _) in transformers.items()}
        self._clock = StepClock(pipeline)
        layered = isinstance(config, LayerSettings)
        configs = [own for row in config.layers.values() for own in row] if layered else [config]
        self._plans = {own: PlanCache(method, own) for own in layerwise.distinct(configs)}
        shared = method, config, schedule, self._clock, self._plans, impl, allow_dense, check, dense_backend
        self._engines = [Engine(name, module, family, *shared) for name, (module, family) in transformers.items()]
        self._notes = notes
        self.active = False
        self.trained: Trained | None = None
        self._undo_training: Callable[[], None] | None = None

    def apply(self) -> None:
        """Put the method to work. An error undoes everything."""
        try:
            for engine in self._engines:
                engine.attach(self)
        except BaseException:
            for engine in self._engines:
                engine.detach()
            raise
        self.active = True
        for transformer in self.transformers.values():
            _ACTIVE[transformer] = weakref.ref(self)

    def remove(self) -> list[str]:
        """Undo processors, hooks, learned weights and what `load` loaded. A second call does nothing.

        Returns:
            Attention modules that keep a processor which was set on them since.
        """
        if not self.active:
            return []
        self.active = False
        left = [name for engine in self._engines for name in engine.detach()]
        if self._undo_training is not None:
            self._undo_training()
        for transformer in self.transformers.values():
            _ACTIVE.pop(transformer, None)
        return left

    def set_step(self, index: int | None, count: int | None = None) -> None:
        """Set the denoising step: `index` of `count`, until the next `set_step`. None reads the scheduler again.

        Raises:
            DitAccelError: not 0 <= index < count.
        """
        self._clock.set(index, count)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model's own attention inside the block. The method and its learned weights stay in place."""
        before = [engine.paused for engine in self._engines]
        for engine in self._engines:
            engine.paused = True
        try:
            yield
        finally:
            for engine, paused in zip(self._engines, before, strict=True):
                engine.paused = paused

    @contextlib.contextmanager
    def watch(self, watcher: Callable[[AttentionCall], None]) -> Iterator[None]:
        """Call `watcher` inside the block with every sparse attention call of every layer.

        `AttentionCall.measure` compares a call with dense attention on sampled queries. A compiled transformer cannot
        be watched.

        Example:
            >>> with accel.watch(lambda call: print(call.layer, call.step, call.measure().error)):
            ...     pipe(prompt)
        """
        for engine in self._engines:
            engine.watchers.append(watcher)
        try:
            yield
        finally:
            for engine in self._engines:
                engine.watchers.remove(watcher)

    def report(self) -> Report:
        """What ran so far. It works after `remove` too."""
        for engine in self._engines:
            engine.count_last_call()
        layers = self._layers()
        return Report(
            method=self.method,
            config=settings_of(self.config) if layers is None else {"layers": layers},
            schedule=dataclasses.asdict(self.schedule),
            impl=self.impl,
            calls={engine.name: engine.calls for engine in self._engines},
            grids=self._densities(),
            layers=[layer.report(engine.name) for engine in self._engines for layer in engine.layers],
            notes=list(dict.fromkeys((*self._notes, *(note for engine in self._engines for note in engine.notes)))),
        )

    def _layers(self) -> dict[str, Any] | None:
        """Settings of every layer in plain values; None where all layers have the same."""
        return self.config.as_dict() if isinstance(self.config, LayerSettings) else None

    def _densities(self) -> dict[str, float | None]:
        """Density of the plans on each grid, the mean over sparse layers; None if only calls tell it."""
        seen: dict[str, list[float | None]] = {}
        for layer in (layer for engine in self._engines for layer in engine.layers if layer.dense_reason is None):
            for grid, density in self._plans[layer.config].densities.items():
                seen.setdefault(str(grid), []).append(density)
        known = {grid: [each for each in found if each is not None] for grid, found in seen.items()}
        return {grid: statistics.mean(densities) if densities else None for grid, densities in known.items()}

    def learned_weights(self) -> dict[str, nn.Module]:
        """The method's learned modules, by the dotted path of their attention module in the pipeline."""
        layers = [(engine.name, layer) for engine in self._engines for layer in engine.layers]
        return {
            f"{name}.{layer.name}.{layer.attribute}": layer.learned
            for name, layer in layers
            if layer.learned is not None
        }

    def save_pretrained(
        self,
        path: str | pathlib.Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write settings (JSON), learned weights and a fine-tuning (safetensors) to the folder `path`.

        Complete files replace old ones.

        Args:
            push_to_hub: also upload the folder to the Hugging Face Hub, as Diffusers' models do.
            repo_id: the repository there; the folder's name if None.
            token, private, commit_message: of the upload.

        Raises:
            DitAccelError: the folder cannot be written, or `remove` has undone the fine-tuning.
        """
        if self.trained is not None and not self.active:
            raise DitAccelError(
                "remove() has taken the fine-tuning's weights out of the model. Save the accelerator before remove(), "
                "or load it again."
            )
        layers = self._layers()
        settings = {
            "method": self.method,
            "config": settings_of(self.config) if layers is None else {},
            "layers": layers,
            "schedule": dataclasses.asdict(self.schedule),
            "impl": self.impl,
            "allow_dense": self.allow_dense,
        }
        weights = {
            f"{name}.{key}": tensor
            for name, module in self.learned_weights().items()
            for key, tensor in module.state_dict().items()
        }
        checkpoint.save(path, settings, checkpoint.identify(self.transformers), weights, self._write_training)
        if push_to_hub:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            target = api.create_repo(repo_id or pathlib.Path(path).name, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=target, folder_path=path, commit_message=commit_message or "Upload accelerator")

    def _write_training(self, folder: pathlib.Path) -> dict[str, Any] | None:
        return None if self.trained is None else adapters.write(folder, self.trained, self.transformers)

    def take_training(self, trained: Trained, undo: Callable[[], None]) -> None:
        """Record a fine-tuning: `save_pretrained` writes it, and `remove` calls `undo`."""
        self.trained, self._undo_training = trained, undo

    def __enter__(self) -> Accelerator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"Accelerator({self.config}, {', '.join(self.transformers)}, {state})"


def accelerate(
    target: Any,
    method: str | None = None,
    *,
    layer_schedule: str | pathlib.Path | LayerSettings | None = None,
    preset: bool = False,
    dense_steps: Amount | None = None,
    dense_last_steps: Amount | None = None,
    dense_layers: Amount | tuple[int, ...] | None = None,
    impl: Impl = "auto",
    allow_dense: bool = True,
    verify: Verify | None = None,
    keep_dense_above: float | None = None,
    dense_backend: str | None = None,
    replace: bool = False,
    **config: Any,
) -> Accelerator:
    """Replace the self-attention of a pipeline's transformers by `method`.

    Everything else stays the model's own; a dense step or layer runs the model's own processor, bit for bit. Settings
    that cannot work are refused here, or at the first call before any attention has run.

    - With gradient checkpointing, run a call's backward pass before the next call. Recomputation follows the last call.
    - Another pipeline that shares the transformer must share the scheduler, whose steps count.
    - One thread at a time may call an accelerated transformer.

    Args:
        target: a Diffusers pipeline, modular or not; an object with a `transformer`; or one transformer.
        method: a name from `list_methods`; None with `layer_schedule`.
        layer_schedule: method and settings of every layer, in place of `method`, `config` and `dense_layers`: a JSON
            file (format: `dit_accel.hooks.layers`) or `LayerSettings`. It may have dense steps too; given ones win.
        preset: take the settings, dense steps and dense layers recommended for the model's family. What is given
            besides wins. `dit-accel ls` shows them.
        dense_steps, dense_last_steps: first and last denoising steps that stay dense, as a number or a share of the
            scheduler's trajectory. Image-to-image may start in its middle. None: none, or the preset's.
        dense_layers: first layers that stay dense, as a number or a share, or a tuple of indices; None as above.
        impl: "auto" (the fastest that computes the same) or an implementation's name, which runs or raises.
        allow_dense: on CUDA, run the model's own attention above the density at which it is measured to be faster
            (`dit_accel.hooks.break_even`; no density is in its table yet). Only with impl="auto", and never for sla.
        verify: "first-call" compares each layer of the first sparse call with dense attention, on 256 queries of each
            head. The report then holds relative error and kept softmax mass. Compile the transformer after that call.
        keep_dense_above: with `verify`, layers with a larger relative error stay dense, from that call on.
        dense_backend: back end of dense steps and layers: a name of Diffusers' dispatcher, or "auto" for the fastest
            that computes the same. None: the model's own, bit for bit.
        replace: first remove an accelerator that is already at work.
        config: settings of the method. ``budgets=FILE`` gives each layer and head its own, from a calibration's file.

    Raises:
        DitAccelError: the method or a setting is unknown, the family has no preset, or the model is not supported or
            already accelerated.

    Example:
        >>> accel = accelerate(pipe, "radial", decay=0.2, dense_steps=12, dense_layers=1)
        >>> video = pipe(prompt).frames[0]
        >>> print(accel.report())
        >>> accel.remove()
    """
    amounts = {"dense_steps": dense_steps, "dense_last_steps": dense_last_steps, "dense_layers": dense_layers}
    given: dict[str, Any] = {name: plain(amount) for name, amount in amounts.items() if amount is not None}
    notes: tuple[str, ...] = ()
    if preset:
        config, given, source = _with_preset(target, method, layer_schedule, config, given)
        notes = (f"settings not given are those recommended: {source}",)
    settings = layerwise.chosen(method, layer_schedule, config, given.get("dense_layers", 0))
    if isinstance(settings, LayerSettings):
        given = {**settings.schedule, **given, "dense_layers": 0}  # which are among the settings
    chosen = get_method(settings.method if isinstance(settings, LayerSettings) else str(method))
    dense, check = Schedule(**given), SelfCheck(verify, keep_dense_above)
    impls.check(impl)
    transformers, pipeline = find_transformers(target)
    known = (_ACTIVE.get(transformer) for transformer, _ in transformers.values())
    present = {accel for reference in known if reference is not None and (accel := reference()) is not None}
    if present and not replace:
        raise DitAccelError(
            f"{type(target).__name__} is already accelerated with {next(iter(present)).method}. Call remove() on that "
            "accelerator first, or pass replace=True."
        )
    accel = Accelerator(transformers, pipeline, chosen, settings, dense, impl, allow_dense, check, dense_backend, notes)
    for old in present:  # only now, when the new one is known to fit
        old.remove()
    accel.apply()
    return accel


def _with_preset(
    target: Any, method: str | None, layer_schedule: Any, config: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Settings, schedule and source of the family's preset; what is given replaces its values."""
    if method is None or layer_schedule is not None:
        raise DitAccelError(
            "preset=True takes the recommended settings of one method. Name the method, such as 'radial', and leave "
            f"out layer_schedule= (got method {method!r}, layer_schedule {layer_schedule!r})."
        )
    get_method(method)
    transformers = list(find_transformers(target)[0].values())
    advice = transformers[0][1].preset(method, len(transformers))
    return {**advice.config, **config}, {**advice.schedule, **given}, advice.source


@contextlib.contextmanager
def accelerated(target: Any, method: str | None = None, **arguments: Any) -> Iterator[Accelerator]:
    """Accelerate inside a with block; the arguments are those of `accelerate`.

    Example:
        >>> with accelerated(pipe, "gna", window=(18, 24, 24), stride=(16, 8, 8)) as accel:
        ...     video = pipe(prompt).frames[0]
    """
    with accelerate(target, method, **arguments) as accel:
        yield accel
