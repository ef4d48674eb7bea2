"""The door for users of the library: accelerate a pipeline, see what was done, take it back."""

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
from dit_accel.hooks.engine import Engine, PlanCache
from dit_accel.hooks.layers import LayerSettings
from dit_accel.hooks.report import Report
from dit_accel.hooks.schedule import Amount, Schedule
from dit_accel.hooks.selfcheck import AttentionCall, SelfCheck, Verify
from dit_accel.hooks.steps import StepClock
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Impl
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import Method, get_method

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Accelerator]] = weakref.WeakKeyDictionary()


class Accelerator:
    """A method at work in the transformers of a pipeline; made by `accelerate`, undone by `remove`.

    Usable in a with statement, which removes it at the end.

    Attributes:
        method: name.
        config: the method's settings, a frozen dataclass; `LayerSettings` where every layer has its own.
        schedule: which steps and layers stay dense.
        impl: "auto", "reference", "portable" or "triton".
        allow_dense: whether the model's own attention may run where it is measured to be faster.
        transformers: by component name.
        trained: the fine-tuning that is at work besides the method's own weights; None without one.
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
        self._engines = [
            Engine(
                name,
                transformer,
                family,
                method,
                config,
                schedule,
                self._clock,
                self._plans,
                impl,
                allow_dense,
                check,
                dense_backend,
            )
            for name, (transformer, family) in transformers.items()
        ]
        self._notes = notes
        self.active = False
        self.trained: Trained | None = None
        self._undo_training: Callable[[], None] | None = None

    def apply(self) -> None:
        """Put the method to work; on an error everything is as before."""
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
        """Take everything back: processors, hooks, learned weights, what `load` loaded. A second call does nothing.

        Returns:
            Attention modules that were left as they are, because another processor was set on them since.
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
        """State the denoising step by hand: `index` of `count`, until the next call; None goes back to the scheduler.

        Raises:
            DitAccelError: not 0 <= index < count.
        """
        self._clock.set(index, count)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model runs its own attention; the method and its learned weights stay in place."""
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
        """Inside the block `watcher` is called with every sparse attention call of every layer.

        What it measures is its own choice: `AttentionCall.measure` compares with dense attention on sampled queries. A
        compiled transformer cannot be watched.

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
        """What was done so far. It stays readable after `remove`."""
        for engine in self._engines:
            engine.count_last_call()
        return Report(
            method=self.method,
            config=self._config_record(),
            schedule=dataclasses.asdict(self.schedule),
            impl=self.impl,
            calls={engine.name: engine.calls for engine in self._engines},
            grids=self._densities(),
            layers=[layer for engine in self._engines for layer in engine.layer_reports()],
            notes=list(dict.fromkeys((*self._notes, *(note for engine in self._engines for note in engine.notes)))),
        )

    def _config_record(self) -> dict[str, Any]:
        if isinstance(self.config, LayerSettings):
            return {"layers": self.config.as_dict()}
        return dataclasses.asdict(self.config)

    def _densities(self) -> dict[str, float | None]:
        """The plans' density on each grid, the mean over sparse layers; None if it is known from calls only."""
        seen: dict[str, list[float | None]] = {}
        for layer in (layer for engine in self._engines for layer in engine.layers if layer.dense_reason is None):
            for grid, density in self._plans[layer.config].densities.items():
                seen.setdefault(str(grid), []).append(density)
        known = {grid: [each for each in found if each is not None] for grid, found in seen.items()}
        return {grid: statistics.mean(densities) if densities else None for grid, densities in known.items()}

    def learned_weights(self) -> dict[str, nn.Module]:
        """The method's learned modules, by the dotted path of their attention module in the pipeline."""
        return {name: module for engine in self._engines for name, module in engine.learned_modules()}

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

        Files are written under temporary names and renamed when complete.

        Args:
            path: the folder.
            push_to_hub: also upload the folder to the Hugging Face Hub, as Diffusers' models do.
            repo_id: where to; the folder's name if not given.
            token, private, commit_message: of the upload.

        Raises:
            DitAccelError: the folder cannot be written, or `remove` has taken back a fine-tuning.
        """
        if self.trained is not None and not self.active:
            raise DitAccelError(
                "This accelerator was removed, and the weights of its fine-tuning with it; save it before remove(), or "
                "load it again."
            )
        layered = isinstance(self.config, LayerSettings)
        settings = {
            "method": self.method,
            "config": {} if layered else dataclasses.asdict(self.config),
            "layers": self.config.as_dict() if layered else None,
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
        """Keep what a fine-tuning is, for saving, and what takes it back out of the model, for `remove`."""
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
    """Swap the self-attention of a pipeline's transformers for `method`.

    Cross-attention, weights and everything else stay the model's own. A dense step or layer runs the model's own
    processor, bit for bit. What cannot work is refused here, or at the first call before any attention has run.
    With gradient checkpointing, a call's backward pass has to come before the next call: what is computed again is
    computed as the latest call was. Another pipeline that shares the transformer has to share the scheduler too, whose
    steps are the ones that count. One thread at a time may call an accelerated transformer: what is decided for a call
    holds until the next one.

    Args:
        target: a Diffusers pipeline, modular or not; an object with a `transformer`; or one transformer.
        method: "dense", "gna", "radial", "sla" or "tile"; see `list_methods`. Left out where `layer_schedule` says it.
        layer_schedule: the method and the settings of every layer, in place of `method`, `config` and `dense_layers`;
            a JSON file (format: `dit_accel.hooks.layers`) or `LayerSettings`.
        preset: take the settings and dense steps and layers that are recommended for the model's family; what is given
            besides wins. `dit-accel ls` shows them.
        dense_steps, dense_last_steps: first and last denoising steps that stay dense, as a number or a share of all.
            A step is a position on the scheduler's trajectory: image-to-image that starts halfway starts halfway.
            None: none, or as the preset says.
        dense_layers: first layers that stay dense, as a number or a share, or a tuple of indices; None as above.
        impl: "auto" (the fastest that computes the same), "reference", "portable" or "triton"; a named one runs or
            raises.
        allow_dense: let the model's own attention run on CUDA above the density at which it is measured to be faster;
            the report says so (`dit_accel.hooks.break_even`, where nothing is measured yet). Only with impl="auto", and
            never for sla, whose projection is trained.
        verify: "first-call" compares each layer of the first sparse call with dense attention, on 256 queries of each
            head; the report then tells relative error and kept softmax mass. It costs about as much as the dense
            attention of those queries. A transformer has to be compiled after that call.
        keep_dense_above: with `verify`, layers whose relative error is above this stay dense, in that call already.
        dense_backend: back end of dense steps and layers, a name of Diffusers' dispatcher, or "auto" for the fastest
            here that computes the same; the report names it. None: the model's own, bit for bit.
        replace: first remove an accelerator that is already at work.
        config: settings of the method.

    Returns:
        The accelerator, at work.

    Raises:
        DitAccelError: unknown method or setting, no recommended settings where a preset is asked for, a model that is
            not supported, or one that is accelerated already.

    Example:
        >>> accel = accelerate(pipe, "radial", decay=0.2, dense_steps=12, dense_layers=1)
        >>> video = pipe(prompt).frames[0]
        >>> print(accel.report())
        >>> accel.remove()
    """
    amounts = {"dense_steps": dense_steps, "dense_last_steps": dense_last_steps, "dense_layers": dense_layers}
    given: dict[str, Any] = {name: amount for name, amount in amounts.items() if amount is not None}
    notes: tuple[str, ...] = ()
    if preset:
        config, given, source = _with_preset(target, method, layer_schedule, config, given)
        notes = (f"settings not given are those recommended: {source}",)
    settings = layerwise.chosen(method, layer_schedule, config, given.get("dense_layers", 0))
    chosen = get_method(settings.method if isinstance(settings, LayerSettings) else str(method))
    dense, check = Schedule(**given), SelfCheck(verify, keep_dense_above)
    impls.check(impl)
    transformers, pipeline = find_transformers(target)
    present = {accel for module, _ in transformers.values() if (accel := _accelerator_of(module)) is not None}
    if present and not replace:
        raise DitAccelError(
            f"{type(target).__name__} is already accelerated with {next(iter(present)).method}; call remove() on that "
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
    """Settings, and dense steps and layers, recommended for the target's family save those given; and their source."""
    if method is None or layer_schedule is not None:
        raise DitAccelError(
            "preset=True takes the recommended settings of one method, such as 'radial': name it, and leave out "
            f"layer_schedule= (got method {method!r}, layer_schedule {layer_schedule!r})."
        )
    get_method(method)
    transformers = list(find_transformers(target)[0].values())
    advice = transformers[0][1].preset(method, len(transformers))
    return {**advice.config, **config}, {**advice.schedule, **given}, advice.source


@contextlib.contextmanager
def accelerated(target: Any, method: str | None = None, **arguments: Any) -> Iterator[Accelerator]:
    """`accelerate` for the length of a with block.

    Example:
        >>> with accelerated(pipe, "gna", window=(18, 24, 24), stride=(16, 8, 8)) as accel:
        ...     video = pipe(prompt).frames[0]
    """
    accel = accelerate(target, method, **arguments)
    try:
        yield accel
    finally:
        accel.remove()


def _accelerator_of(transformer: nn.Module) -> Accelerator | None:
    reference = _ACTIVE.get(transformer)
    return None if reference is None else reference()
