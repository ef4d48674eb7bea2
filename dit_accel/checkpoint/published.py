"""Published weights for sparse attention, loaded into stock pipelines.

A format is one file in `formats/` with a `FORMAT`. It is known by the names of its tensors and by its configuration,
never by the name of its file. Names, shapes and settings are checked before anything in the pipeline changes.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from dit_accel import registry
from dit_accel.accelerator import Accelerator, accelerate
from dit_accel.checkpoint import few_steps, model_weights
from dit_accel.checkpoint import lora as adapters
from dit_accel.checkpoint.few_steps import Sampler
from dit_accel.checkpoint.model_weights import NewWeight, base_weights
from dit_accel.checkpoint.weight_files import StoredModel, WeightFiles
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.targets import find_transformers
from dit_accel.setting import Setting


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What weights were tuned for.

    Args:
        method, config: the sparse attention.
        call: defaults of the pipeline's calls, such as the number of steps.
        sampler: the scheduler's; None: the pipeline keeps its own.
        ask: settings that the files do not hold and the user has to give, each with the values to choose from.
    """

    method: str
    config: Mapping[str, Any]
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampler: Sampler | None = None
    ask: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WeightReading:
    """What the files of one transformer become.

    Args:
        weights: the model's, by their names in Diffusers' class.
        learned: the method's, by their names in the transformer, such as blocks.0.attn1.sparse_linear.proj.weight.
        needed: whether the files have to hold the model's weight of that name.
        notes: for the report.
    """

    weights: Mapping[str, NewWeight]
    learned: Mapping[str, NewWeight]
    needed: Callable[[str], bool]
    notes: tuple[str, ...] = ()


class Format(abc.ABC):
    """A published format. The docstring of its class is one line: whose weights, for which model.

    Attributes:
        name: lower case, the name of its file.
        source: where they are published.
        transformers: the classes of Diffusers that it fits.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]

    @property
    def summary(self) -> str:
        """Whose weights, for which model."""
        return str(self.__doc__).rstrip(".")

    @abc.abstractmethod
    def detect(self, files: WeightFiles) -> bool:
        """Whether files are of this format, by names of tensors and configuration."""

    @abc.abstractmethod
    def tuned(self, files: WeightFiles) -> Tuned:
        """What they were tuned for."""

    @abc.abstractmethod
    def read(self, model: StoredModel) -> WeightReading:
        """Names and shapes of one transformer's files as the model's; tensors stay unread.

        Raises:
            DitAccelError: its tensors contradict each other.
        """


@functools.cache
def get_formats() -> Mapping[str, Format]:
    """Every published format by name, sorted."""
    return {known.name: known for known in registry.declared("checkpoint.formats", "FORMAT")}


def detect(files: WeightFiles) -> Format:
    """The format of these files.

    Raises:
        DitAccelError: no known format fits, or several do.
    """
    fitting = [known for known in get_formats().values() if known.detect(files)]
    if len(fitting) == 1:
        return fitting[0]
    first = next(iter(files.first.tensors), "no tensor at all")
    formats = f"of several formats ({', '.join(known.name for known in fitting)})" if fitting else "of no known format"
    raise DitAccelError(
        f"{files.name} holds no saved accelerator, and its weights are {formats}; they start with {first}. "
        f"`dit-accel ls formats` lists: {', '.join(get_formats())}."
    )


def settings(chosen: Format, files: WeightFiles, overrides: Mapping[str, Any]) -> Tuned:
    """What the files were tuned for, with the settings that the user gave in place of theirs.

    Raises:
        DitAccelError: a setting that the files do not tell is missing, or one is unknown or refused.
    """
    tuned = chosen.tuned(files)
    for name, values in tuned.ask.items():
        if name not in overrides:
            raise DitAccelError(
                f"{files.name} does not hold the {name} that it was tuned for. Give {name}= ({values}), or --set "
                f"{name}=... on the command line."
            )
    config = {**tuned.config, **overrides}
    registry.make_config(tuned.method, config)
    return dataclasses.replace(tuned, config=config)


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Published weights that fit a pipeline. Nothing has changed yet."""

    format: Format
    tuned: Tuned
    readings: Mapping[str, WeightReading]


def fit(target: Any, files: WeightFiles, overrides: Mapping[str, Any]) -> Fitting:
    """Compare files with a pipeline or transformer, without reading a tensor or changing anything.

    Raises:
        DitAccelError: the format is unknown, or the files do not fit; the message names the first tensor that differs.
    """
    chosen = detect(files)
    tuned = settings(chosen, files, overrides)
    transformers, _ = find_transformers(target)
    if transformers.keys() != files.models.keys():
        raise DitAccelError(
            f"{files.name} holds weights of {', '.join(files.models)}, but this model has {', '.join(transformers)}. "
            "Load them into the pipeline that they belong to."
        )
    readings = {}
    for component, (module, family) in transformers.items():
        if type(module).__name__ not in chosen.transformers:
            raise DitAccelError(
                f"{files.name} is {chosen.name}, for {' or '.join(chosen.transformers)}; this model's {component} is a "
                f"{type(module).__name__}."
            )
        readings[component] = reading = chosen.read(files.models[component])
        shapes = {name: weight.shape for name, weight in base_weights(module)}
        model_weights.check(files.name, reading.weights, shapes, reading.needed, where=component)
        learned, method = learned_shapes(tuned, module, family), f"{tuned.method} in {component}"
        model_weights.check(files.name, reading.learned, learned, model_weights.every, where=method)
    return Fitting(chosen, tuned, readings)


def learned_shapes(tuned: Tuned, transformer: nn.Module, family: Family) -> dict[str, torch.Size]:
    """Names and shapes of the weights that a method learns in a transformer."""
    config = registry.make_config(tuned.method, tuned.config)
    module = registry.get_method(tuned.method).learned(config)
    shapes: dict[str, torch.Size] = {}
    if module is None:
        return shapes
    for name, attention in family.attentions(transformer):
        with torch.device("meta"):
            sizes = family.channels(attention), family.head_dim(attention), family.heads(attention)
            weights = module.build(*sizes, config).state_dict()
        shapes |= {f"{name}.{module.attribute}.{key}": value.shape for key, value in weights.items()}
    return shapes


def load(
    target: Any,
    files: WeightFiles,
    overrides: Mapping[str, Any],
    setting: Setting | None = None,
    *,
    keep_int8: bool = False,
    **how: Any,
) -> Accelerator:
    """Load published weights.

    Args:
        setting, keep_int8: as in `checkpoint.load`.
        overrides: settings of the method, in place of those that the format says.
        how: arguments of `accelerate`.

    Raises:
        DitAccelError: as for `fit` and `accelerate`. Nothing has changed then, save as in `checkpoint.load`.
    """
    fitting = fit(target, files, overrides)
    tuned, (transformers, pipeline) = fitting.tuned, find_transformers(target)
    modules = {name: module for name, (module, _) in transformers.items()}
    for module in modules.values():
        model_weights.check_replaceable(module)
    notes = [f"{fitting.format.name}: weights of {files.name}"]
    notes += [note for reading in fitting.readings.values() for note in reading.notes]
    notes += _int8_notes(fitting, keep_int8)
    accel = accelerate(target, Setting.make(tuned.method, tuned.config) if setting is None else setting, **how)
    try:
        trained = _record(fitting, modules)  # of the base weights: an old accelerator's are gone by now
        learned = {
            f"{owner}.{key}": weight
            for owner, module in accel.learned_weights().items()
            for key, weight in module.state_dict().items()
        }
        with contextlib.ExitStack() as undo:
            for component, reading in fitting.readings.items():
                undo.callback(model_weights.replace(modules[component], reading.weights, keep_int8=keep_int8))
                for name, weight in reading.learned.items():
                    place = learned.get(f"{component}.{name}")
                    if place is not None:  # dense layers have no learned weights
                        place.copy_(weight.make(place).reshape(place.shape))
            restore, changes = few_steps.install(pipeline, trained.call, trained.sampler)
            undo.callback(restore)
            accel.take_training(trained, undo.pop_all().close, [*notes, *changes])
    except BaseException:
        accel.remove()
        raise
    return accel


def _int8_notes(fitting: Fitting, keep: bool) -> list[str]:
    """What becomes of int8 weights, if the files hold any.

    Raises:
        DitAccelError: they shall stay, and there are none, or torchao is not installed.
    """
    count = sum(weight.int8 is not None for reading in fitting.readings.values() for weight in reading.weights.values())
    if not keep:
        return [f"{count} int8 weights are dequantised; keep_int8=True (--keep-int8) keeps them"] if count else []
    if not count:
        raise DitAccelError("keep_int8=True needs int8 matrices of whole tiles; these files hold none. Leave it out.")
    if importlib.util.find_spec("torchao") is None:
        raise DitAccelError("keep_int8=True needs torchao, which is not installed: pip install torchao.")
    return [f"{count} weights stay in int8, through torchao"]


def _record(fitting: Fitting, modules: Mapping[str, nn.Module]) -> adapters.Trained:
    """What `save_pretrained` writes of published weights: all of them, or those that differ from the base model's."""
    present = {name: {key for key, _ in base_weights(module)} for name, module in modules.items()}
    weights = {name: reading.weights for name, reading in fitting.readings.items()}
    complete = all(new.keys() == present[name] for name, new in weights.items())
    changed = {name: tuple(new) for name, new in weights.items() if new and not complete}
    config: Any = getattr(next(iter(modules.values())), "config", {})
    return adapters.Trained(
        model=str(dict(config).get("_name_or_path") or "a model without a name"),
        revision=None,
        fingerprints={name: adapters.fingerprint(module) for name, module in modules.items()},
        full=complete,
        call=dict(fitting.tuned.call),
        changed=changed,
        sampler=fitting.tuned.sampler,
    )
