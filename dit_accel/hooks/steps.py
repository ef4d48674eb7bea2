"""Which denoising step a transformer call belongs to: read from the scheduler, never counted in calls.

Counting calls is wrong: guidance calls the transformer twice a step, caches skip calls, and Wan 2.2 has two
transformers on one trajectory. The scheduler holds the trajectory after `set_timesteps`, and `step` moves its index.
Each call reads the pipeline's scheduler of that moment. Nothing is wrapped, so nothing has to be restored.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dit_accel.caches.at_work import Moment
from dit_accel.errors import DitAccelError
from dit_accel.schedule import Step

NOISE_RANGE = 1000.0


class StepClock:
    """Tells the step of each call.

    Args:
        pipeline: its scheduler is read, after the pipeline's deletion too: a pipeline made `from_pipe` may share it.
            None for a bare transformer, whose timestep values are followed.
    """

    def __init__(self, pipeline: Any | None = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        scheduler = getattr(pipeline, "scheduler", None)
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        self._manual: Step | None = None
        self._last_value: float | None = None
        self._last_index = 0

    def set(self, index: int | None, count: int | None = None) -> None:
        """Set the step of all calls until the next `set`; None reads the scheduler again."""
        if index is None:
            self._manual = None
            return
        integers = [value for value in (index, count) if isinstance(value, int) and not isinstance(value, bool)]
        if len(integers) != 2 or not 0 <= integers[0] < integers[1]:
            raise DitAccelError(f"set_step(i, n) needs integers with 0 <= i < n, got i={index!r}, n={count!r}.")
        self._manual = Step(*integers)

    @property
    def scheduler(self) -> Any | None:
        """The pipeline's present scheduler; None for a bare transformer."""
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is None:
            return None if self._scheduler is None else self._scheduler()
        scheduler = getattr(pipeline, "scheduler", None)
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        return scheduler

    @property
    def execution_device(self) -> Any | None:
        """Where the pipeline runs its models, which offloading keeps elsewhere; None for a bare transformer."""
        return getattr(None if self._pipeline is None else self._pipeline(), "_execution_device", None)

    @property
    def pipeline_config(self) -> Any | None:
        """The pipeline's configuration; None for a bare transformer."""
        return getattr(None if self._pipeline is None else self._pipeline(), "config", None)

    @property
    def reads_values(self) -> bool:
        """Whether only the timestep's value tells the step: without pipeline and `set`."""
        return self._manual is None and self.scheduler is None

    @property
    def run(self) -> Any | None:
        """The scheduler's trajectory, another object in each call of the pipeline; None if nothing shows the run."""
        scheduler = None if self._manual is not None else self.scheduler
        return None if scheduler is None else _trajectory(scheduler)

    def now(self, timestep: torch.Tensor | None) -> Step:
        """The step of a call.

        Args:
            timestep: the transformer's timestep in the scheduler's units (0 to 1000), any shape; None if in others.
                The largest counts: per-token timesteps (Wan 2.2 TI2V) hold 0 for conditioning tokens. Reading it
                waits for the device, so it is read only if the scheduler keeps no index.
        """
        step, scheduler = self.evaluation(timestep), self.scheduler
        order = 1 if self._manual is not None or scheduler is None else max(1, getattr(scheduler, "order", 1))
        if order == 1 or step.count is None:
            return step
        return Step(step.index // order, -(-step.count // order))

    def evaluation(self, timestep: torch.Tensor | None) -> Step:
        """As `now`, but a scheduler of higher order, which evaluates the model several times a step, counts each."""
        if self._manual is not None:
            return self._manual
        scheduler = self.scheduler
        if scheduler is None:
            return self._follow(_value(timestep))
        timesteps = _trajectory(scheduler)
        if timesteps is None:
            raise DitAccelError(
                f"The step schedule needs the trajectory, but {type(scheduler).__name__} has no timesteps yet. Run the "
                "accelerated pipeline (another that shares the transformer must share the scheduler too), or call "
                "set_step(i, n) before calling the transformer directly."
            )
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None and timestep is None and hasattr(scheduler, "step_index"):
            index = 0  # the scheduler sets its index in its first step
        if index is None or not 0 <= index < len(timesteps):
            index = _nearest(timesteps, _value(timestep))
        return Step(int(index), len(timesteps))

    def told(self, timestep: torch.Tensor | None) -> bool:
        """Whether anything tells the step."""
        if self._manual is not None:
            return True
        scheduler = self.scheduler
        return timestep is not None if scheduler is None else _trajectory(scheduler) is not None

    def now_if_told(self, timestep: torch.Tensor | None) -> Step | None:
        """`now`, or None if nothing tells the step."""
        return self.now(timestep) if self.told(timestep) else None

    def noise(self, index: int) -> tuple[float | None, float | None]:
        """The scheduler's timestep and noise level of an evaluation; None where it has none. Waits for the device."""
        scheduler = self.scheduler
        rows = (None, None) if scheduler is None else (_trajectory(scheduler), getattr(scheduler, "sigmas", None))
        timestep, sigma = (None if row is None or index >= len(row) else float(row[index]) for row in rows)
        return timestep, sigma

    def moment(self, timestep: torch.Tensor | None, shape: Any, noise: bool) -> Moment:
        """What a step cache reads of a call; `shape` is the call's, and `noise` whether it reads `self.noise`."""
        if not self.told(timestep):
            return Moment(shape=shape)
        step = self.evaluation(timestep)
        levels = self.noise(step.index) if noise else (None, None)
        return Moment(self.run, step.index, step.count, *levels, shape)

    def _follow(self, value: float) -> Step:
        if self._last_value is None or value > self._last_value:
            self._last_index = 0
        elif value < self._last_value:
            self._last_index += 1
        self._last_value = value
        return Step(self._last_index, None, progress=1 - value / NOISE_RANGE)


def _trajectory(scheduler: Any) -> Any | None:
    """The timesteps that `set_timesteps` chose. None before: many schedulers then hold all training steps."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    chosen = getattr(scheduler, "num_inference_steps", None) is not None or len(timesteps) != trained
    return timesteps if chosen else None


def _value(timestep: torch.Tensor | float | None) -> float:
    if timestep is None:
        raise DitAccelError(
            "The step schedule needs the denoising step, and nothing in this call tells it. Call set_step(i, n) before "
            "the call, or accelerate the pipeline and run that."
        )
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _nearest(timesteps: Any, value: float) -> int:
    distances = (torch.as_tensor(timesteps, dtype=torch.float64, device="cpu") - value).abs()
    return int(distances.argmin())
