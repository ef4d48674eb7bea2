"""The library's public functions: accelerate a pipeline, report what ran, undo it."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import pathlib
import statistics
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from dit_accel.caches.record import CacheReport
from dit_accel.caches.step_cache import StepCache
from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora as adapters
from dit_accel.checkpoint.lora import Trained
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.hooks.engine import Engine
from dit_accel.hooks.levels import SIZE, Level, case_of
from dit_accel.hooks.plan_cache import PlanCache
from dit_accel.hooks.report import Report
from dit_accel.hooks.selfcheck import ComputedAttention, SelfCheck, Verify
from dit_accel.hooks.steps import StepClock
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Impl
from dit_accel.method import Method
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.levels import DEFAULT, LEVELS
from dit_accel.pipelines.targets import find_transformers
from dit_accel.registry import DENSE, get_method
from dit_accel.schedule import Amount
from dit_accel.setting import Setting

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Accelerator]] = weakref.WeakKeyDictionary()


class Accelerator:
    """A method at work in the transformers of a pipeline; `accelerate` makes it, `remove` or a with block undoes it.

    Attributes:
        setting: method, settings and schedule of every layer and step.
        impl: as `accelerate` was asked for.
        transformers: by component name.
        trained: the fine-tuning at work besides the method's own weights; None without one.
    """

    def __init__(
        self,
        transformers: dict[str, tuple[nn.Module, Family]],
        pipeline: Any | None,
        method: Method,
        setting: Setting,
        impl: Impl,
        check: SelfCheck,
        notes: tuple[str, ...] = (),
        level: Level | None = None,
    ) -> None:
        self.setting, self.impl = setting, impl
        self.transformers = {name: transformer for name, (transformer, _) in transformers.items()}
        self._clock = StepClock(pipeline)
        self._plans = PlanCache(method, setting.layers is None)
        shared = method, setting, self._clock, self._plans, impl, check
        self._engines = [Engine(name, module, family, *shared) for name, (module, family) in transformers.items()]
        for engine in self._engines:
            engine.level, engine.siblings = level, self._engines
        self._notes = notes if level is None else (level.note, *notes)
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
        layers, method = [layer for engine in self._engines for layer in engine.layers], self.setting.method
        if method != DENSE and all(layer.dense_reason for layer in layers):
            warnings.warn(
                f"Every layer stays dense, so {method} computes nothing. Give fewer dense_layers or other settings.",
                DitAccelWarning,
                stacklevel=3,
            )
        for transformer in self.transformers.values():
            _ACTIVE[transformer] = weakref.ref(self)

    def remove(self) -> list[str]:
        """Undo processors, hooks, learned weights and what `load` loaded. A second call does nothing.

        Returns:
            Attention modules that keep a processor which was set on them since.

        Raises:
            DitAccelError: offloading to disk keeps the model's weights out of reach. Nothing is undone then.
        """
        if not self.active:
            return []
        if self.trained is not None:
            adapters.check_removable(self.trained, self.transformers)
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
        """Run the model's own attention inside the block, and every step. Method and learned weights stay in place."""
        before = [engine.paused for engine in self._engines]
        for engine in self._engines:
            engine.pause(True)
        try:
            yield
        finally:
            for engine, paused in zip(self._engines, before, strict=True):
                engine.pause(paused)

    @contextlib.contextmanager
    def watch(self, watcher: Callable[[ComputedAttention], None]) -> Iterator[None]:
        """Call `watcher` with every sparse attention call inside the block, unless the transformer is compiled.

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
        return Report(
            self.setting,
            self.impl,
            calls={engine.name: engine.calls for engine in self._engines},
            grids=self._densities(),
            layers=[layer.report(engine.name) for engine in self._engines for layer in engine.layers],
            cache=CacheReport.joined([engine.cache.report() for engine in self._engines if engine.cache is not None]),
            notes=list(dict.fromkeys((*self._notes, *(note for engine in self._engines for note in engine.all_notes)))),
            traffic={engine.name: engine.several.traffic for engine in self._engines if engine.several.traffic.calls},
        )

    def _densities(self) -> dict[str, float | None]:
        """Density of the plans on each grid, the mean over sparse layers; None if only calls tell it."""
        layers = [layer for engine in self._engines for layer in engine.layers if layer.dense_reason is None]
        grids = self._plans.grids
        known = [[self._plans.density(layer.config, grid) for layer in layers] for grid in grids]
        means = [[density for density in row if density is not None] for row in known]
        return {str(grid): statistics.mean(row) if row else None for grid, row in zip(grids, means, strict=True)}

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

        Complete files replace old ones. A step cache's calibration file is read again, and its ratios written there.

        Args:
            push_to_hub: also upload the folder to the Hugging Face Hub, as Diffusers' models do.
            repo_id: the repository there; the folder's name if None.
            token, private, commit_message: of the upload.

        Raises:
            DitAccelError: the folder cannot be written, the calibration file cannot be read, or `remove` has undone the
                fine-tuning.
        """
        if self.trained is not None and not self.active:
            raise DitAccelError(
                "remove() has taken the fine-tuning's weights out of the model. Save the accelerator before remove(), "
                "or load it again."
            )
        weights = {
            f"{name}.{key}": tensor
            for name, module in self.learned_weights().items()
            for key, tensor in module.state_dict().items()
        }
        models = checkpoint.identify(self.transformers)
        checkpoint.save(path, self.setting, self.impl, models, weights, self._write_training)
        if push_to_hub:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            target = api.create_repo(repo_id or pathlib.Path(path).name, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=target, folder_path=path, commit_message=commit_message or "Upload accelerator")

    def _write_training(self, folder: pathlib.Path) -> dict[str, Any] | None:
        return None if self.trained is None else adapters.write(folder, self.trained, self.transformers)

    def take_training(self, trained: Trained, undo: Callable[[], None], notes: Iterable[str] = ()) -> None:
        """Record a fine-tuning: `save_pretrained` writes it, `remove` calls `undo`, and reports have the notes."""
        self.trained, self._undo_training = trained, undo
        self.add_notes(notes)

    def add_notes(self, notes: Iterable[str]) -> None:
        """Add remarks to the reports."""
        self._notes += tuple(notes)

    def __enter__(self) -> Accelerator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"Accelerator({self.setting.text}, {', '.join(self.transformers)}, {state})"

    def _repr_html_(self) -> str:
        """The report, for notebooks."""
        return f"<p>{html.escape(repr(self))}</p>{self.report()._repr_html_()}"


def accelerate(
    target: Any,
    method: str | Setting | None = None,
    *,
    layer_schedule: str | pathlib.Path | None = None,
    preset: bool = False,
    dense_steps: Amount | None = None,
    dense_last_steps: Amount | None = None,
    dense_layers: Amount | tuple[int, ...] | None = None,
    impl: Impl = "auto",
    verify: Verify | None = None,
    keep_dense_above: float | None = None,
    dense_backend: str | None = None,
    cache: StepCache | str | None = None,
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
        method: a level ("faithful", "balanced" or "fast"), a name from `list_methods`, the text of a setting, or a
            `Setting`. None: that of `layer_schedule`; the family's recommended one with `preset`; else "balanced".
        layer_schedule: a JSON file with a setting (format: `dit_accel.setting`), in place of `method` and `config`. A
            schedule or back end given besides wins over that of a file or a `Setting`.
        preset: take the settings, dense steps and dense layers recommended for the model's family. What is given
            besides wins. `dit-accel ls` shows them.
        dense_steps, dense_last_steps: first and last denoising steps that stay dense, as a number or a share of the
            scheduler's trajectory. Image-to-image may start in its middle. None: none, or the preset's.
        dense_layers: first layers that stay dense, as a number or a share, or a tuple of indices; None as above.
        impl: "auto" (the fastest that computes the same) or an implementation's name, which runs or raises.
        verify: "first-call" compares each layer of the first sparse call with dense attention, on 256 queries of each
            head. The report then holds relative error and kept softmax mass. Compile the transformer after that call.
        keep_dense_above: with `verify`, layers with a larger relative error stay dense, from that call on.
        dense_backend: back end of dense steps and layers: a name of Diffusers' dispatcher, "auto" for the fastest that
            computes the same, or "auto8" (`hooks.verified_backend`). None: the model's own, bit for bit.
        cache: a step cache of `dit_accel.caches.step_cache`, such as ``mag:threshold=0.12``; also with the method
            "dense". "none" drops that of a level or of a setting.
        replace: first remove an accelerator that is already at work.
        config: settings of the method, or the size of the calls that a level is chosen for: ``frames``, ``height``,
            ``width`` and ``steps``, by default the pipeline's own. ``budgets=FILE`` gives each layer and head its
            own, from a calibration's file.

    Raises:
        DitAccelError: the method or a setting is unknown, the family has no preset, the size for a level is unknown, or
            the model is not supported or already accelerated.

    Example:
        >>> accel = accelerate(pipe)
        >>> video = pipe(prompt).frames[0]
        >>> print(accel.report())
        >>> accel.remove()
    """
    words = {
        "dense_steps": dense_steps,
        "dense_last_steps": dense_last_steps,
        "dense_layers": dense_layers,
        "dense_backend": dense_backend,
        "cache": cache,
    }
    transformers, pipeline = find_transformers(target)
    family = next(iter(transformers.values()))[1]
    notes: tuple[str, ...] = ()
    level: Level | None = None
    if isinstance(method, Setting) or layer_schedule is not None:
        setting = _whole(method, layer_schedule, config, preset=preset).changed(**words)
    elif method in LEVELS or (method is None and not preset):
        name = DEFAULT if method is None else method
        _check_level(name, family, config, preset=preset)
        level = Level.choose(name, case_of(transformers, pipeline, config))
        setting = level.setting(**words)
    else:
        advice = functools.partial(family.preset, transformers=len(transformers)) if preset else None
        name = family.first_preset if method is None else method
        if isinstance(name, str) and name.lower() in LEVELS:
            raise DitAccelError(f"Levels are written {', '.join(LEVELS)}; got {name!r}.")
        setting = Setting.make(name, config, preset=advice, **words)
        if advice is not None:
            notes = (f"settings not given are those recommended: {advice(setting.method).source}",)
    check = SelfCheck(verify, keep_dense_above)
    impls.check(impl)
    references = (_ACTIVE.get(transformer) for transformer, _ in transformers.values())
    present = {accel for reference in references if reference is not None and (accel := reference()) is not None}
    if present and not replace:
        raise DitAccelError(
            f"{type(target).__name__} is already accelerated with {next(iter(present)).setting.method}. Call remove() "
            "on that accelerator first, or pass replace=True."
        )
    accel = Accelerator(transformers, pipeline, get_method(setting.method), setting, impl, check, notes, level)
    for old in present:  # only now, when the new one is known to fit
        old.remove()
    accel.apply()
    return accel


def _whole(
    method: str | Setting | None, layer_schedule: str | pathlib.Path | None, config: dict[str, Any], *, preset: bool
) -> Setting:
    """The Setting that was given, or that of the file; neither goes with further settings."""
    if config or preset or (method is not None and layer_schedule is not None):
        raise DitAccelError(
            "A Setting, or the file of layer_schedule, holds the method and its settings. Give one of the two, without "
            f"preset=True and without a method's settings; got method {method!r}, layer_schedule {layer_schedule!r}, "
            f"preset={preset} and {config}."
        )
    if isinstance(method, Setting):
        return method
    if not isinstance(layer_schedule, (str, os.PathLike)):
        raise DitAccelError(
            f"layer_schedule takes a JSON file with a setting; got {layer_schedule!r}. Pass a Setting as the method."
        )
    return Setting.read(layer_schedule)


def _check_level(name: str, family: Family, size: dict[str, Any], *, preset: bool) -> None:
    """Refuse what a level does not take: a method's settings and presets."""
    others = [key for key in size if key not in SIZE]
    if preset or others:
        raise DitAccelError(
            f"The level {name} has its own settings and takes only {', '.join(SIZE)}; got "
            f"{', '.join([*others, *['preset=True'] * preset])}. For settings of your own name a method "
            f"first: {family.choices}."
        )


@contextlib.contextmanager
def accelerated(target: Any, method: str | Setting | None = None, **arguments: Any) -> Iterator[Accelerator]:
    """Accelerate inside a with block; the arguments are those of `accelerate`.

    Example:
        >>> with accelerated(pipe, "gna", window=(18, 24, 24), stride=(16, 8, 8)) as accel:
        ...     video = pipe(prompt).frames[0]
    """
    with accelerate(target, method, **arguments) as accel:
        yield accel
