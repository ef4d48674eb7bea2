"""Sampling in a few steps: the noise levels of distilled weights, and the pipeline's defaults that belong to them.

The scheduler itself is `scheduler.FewStepScheduler`. Sources: rCM as TurboDiffusion runs it
(turbodiffusion/inference/wan2.1_t2v_infer.py), whose TrigFlow times t are the levels tan t / (1 + tan t); DMD as
FastVideo runs it (fastvideo/pipelines/stages/denoising.py); MiniMax-H3's adapters as vLLM-Omni and LightX2V run them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dit_accel import values

TRAINING_STEPS = 1000
TRIGFLOW_TIMES = (1.5, 1.4, 1.0)  # after the first, which is atan of the largest noise over signal


@dataclasses.dataclass(frozen=True)
class Sampler(values.Checked):
    """How distilled weights are sampled.

    Args:
        sigmas: noise levels in (0, 1], falling; n steps take the first n of them.
        timesteps: what the model gets at these levels; None: 1000 sigma, rounded to bfloat16.
        ode: no fresh noise.
        boundary_ratio: of a pipeline with two transformers, the level at which the second takes over.
        dataward: the conventions of MiniMax-H3; see `scheduler.FewStepScheduler`.
        others: noise levels of the pipeline's further schedulers, by component.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...] | None = None
    ode: bool = False
    boundary_ratio: float | None = None
    dataward: bool = False
    others: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


def rcm(sigma_max: float, *, ode: bool = False, boundary_ratio: float | None = None) -> Sampler:
    """The sampler of rCM in up to 4 steps; `sigma_max` is noise over signal: 80 from text, 200 from an image."""
    first = sigma_max / (1 + sigma_max)
    rest = (math.tan(time) / (1 + math.tan(time)) for time in TRIGFLOW_TIMES)
    return Sampler((first, *rest), ode=ode, boundary_ratio=boundary_ratio)


def dmd(timesteps: tuple[float, ...], shift: float) -> Sampler:
    """The sampler of DMD at these timesteps, each at the nearest level of the grid of 1000 with that shift."""
    grid = _shifted((i / TRAINING_STEPS for i in range(1, TRAINING_STEPS + 1)), shift)
    nearest = (min(grid, key=lambda level: abs(TRAINING_STEPS * level - time)) for time in timesteps)
    return Sampler(tuple(nearest), timesteps)


def h3(positions: tuple[float, ...], shift: float, sound_shift: float = 3.0) -> Sampler:
    """The sampler of an adapter for MiniMax-H3 at these positions in (0, 1], shifted for video and for sound."""
    sound = {"audio_scheduler": _shifted(positions, sound_shift)}
    return Sampler(_shifted(positions, shift), ode=True, dataward=True, others=sound)


def _shifted(positions: Iterable[float], shift: float) -> tuple[float, ...]:
    return tuple(shift * position / (1 + (shift - 1) * position) for position in positions)


def install(pipeline: Any, call: Mapping[str, Any], sampler: Sampler | None) -> tuple[Callable[[], None], list[str]]:
    """Give a pipeline's calls these defaults, and a sampler's schedulers. A call's own arguments win.

    The pipeline becomes an object of a subclass with its class's name, whose call has the defaults, draws the
    scheduler's noise from the call's generator and scales the first noise.

    Args:
        pipeline: None for a transformer alone, whose caller samples.
        call: arguments by name; those that the pipeline does not take are ignored.

    Returns:
        A function that restores class, scheduler and boundary, unless the user has set another scheduler since; and
        notes on what changed.
    """
    if pipeline is None or (sampler is None and not call):
        return (lambda: None), ["sample them as they were tuned: a transformer alone has no scheduler"] * bool(sampler)
    from dit_accel.checkpoint.scheduler import FewStepScheduler

    kind = type(pipeline)
    takes = set(inspect.signature(kind.__call__).parameters)
    if hasattr(pipeline, "blocks"):  # a modular pipeline, whose blocks say what a call takes
        takes |= {parameter.name for parameter in pipeline.blocks.inputs}
    call = {name: value for name, value in call.items() if name in takes}
    notes = [f"calls default to {', '.join(f'{name}={value}' for name, value in call.items())}"] if call else []
    with contextlib.ExitStack() as undo:
        pipeline.__class__ = _with_defaults(kind, call, sampler)
        undo.callback(setattr, pipeline, "__class__", kind)
        if sampler is not None:
            for name, sigmas in {"scheduler": sampler.sigmas, **sampler.others}.items():
                scheduler = FewStepScheduler(sigmas, sampler.timesteps, sampler.ode, sampler.dataward)
                old = getattr(pipeline, name, None)
                _set_scheduler(pipeline, name, scheduler)
                undo.callback(_restore_scheduler, pipeline, name, scheduler, old)
                notes.append(
                    f"{name}: {type(scheduler).__name__} in place of {type(old).__name__}, in up to {len(sigmas)} steps"
                )
            before = getattr(pipeline.config, "boundary_ratio", None)
            if sampler.boundary_ratio is not None and before is not None:
                pipeline.register_to_config(boundary_ratio=sampler.boundary_ratio)
                undo.callback(pipeline.register_to_config, boundary_ratio=before)
        return undo.pop_all().close, notes


def _is_ours(scheduler: Any) -> bool:
    from dit_accel.checkpoint.scheduler import FewStepScheduler

    return isinstance(scheduler, FewStepScheduler)


def _set_scheduler(pipeline: Any, name: str, scheduler: Any) -> None:
    if hasattr(pipeline, "update_components"):  # a modular pipeline
        pipeline.update_components(**{name: scheduler})
    else:
        setattr(pipeline, name, scheduler)


def _restore_scheduler(pipeline: Any, name: str, installed: Any, old: Any) -> None:
    if getattr(pipeline, name) is installed:
        _set_scheduler(pipeline, name, old)


def _with_defaults(kind: type, call: Mapping[str, Any], sampler: Sampler | None) -> type:
    """A subclass of a pipeline's class; see `install`."""
    inner: Any = kind.__call__
    signature = inspect.signature(inner)
    changed = [
        parameter.replace(default=call.get(name, parameter.default)) for name, parameter in signature.parameters.items()
    ]

    @functools.wraps(inner)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind_partial(self, *args, **kwargs).arguments | kwargs
        missing = {name: value for name, value in call.items() if name not in arguments}
        with _noise_from(getattr(self, "scheduler", None), arguments.get("generator")):
            return inner(self, *args, **kwargs, **missing)

    __call__.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
    members = {"__call__": __call__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if sampler is not None and sampler.sigmas[0] != 1 and hasattr(kind, "prepare_latents"):
        members["prepare_latents"] = _scaled(kind.prepare_latents)
    return type(kind.__name__, (kind,), members)


@contextlib.contextmanager
def _noise_from(scheduler: Any, generator: Any) -> Iterator[None]:
    """Let a scheduler of ours draw its noise from a generator during the block."""
    if not _is_ours(scheduler):
        yield
        return
    before, scheduler.generator = scheduler.generator, generator
    try:
        yield
    finally:
        scheduler.generator = before


def _scaled(prepare: Any) -> Any:
    """A pipeline's `prepare_latents` with the first noise at the scheduler's level; Wan's pipelines leave that out."""

    @functools.wraps(prepare)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        latents = prepare(self, *args, **kwargs)
        if not _is_ours(self.scheduler):
            return latents
        if isinstance(latents, tuple):  # behind them what an image adds
            return latents[0] * self.scheduler.init_noise_sigma, *latents[1:]
        return latents * self.scheduler.init_noise_sigma

    return prepare_latents
