"""Which denoising steps and which layers keep the model's own dense attention."""

from __future__ import annotations

import dataclasses
import math

from dit_accel.errors import DitAccelError

Amount = int | float
STEPS = ("dense_steps", "dense_last_steps")


@dataclasses.dataclass(frozen=True)
class Step:
    """The position of a transformer call on the denoising trajectory.

    Args:
        index: step, counted from 0.
        count: steps of the whole trajectory; None if only timestep values are known.
        progress: share of the noise range already covered, 0 at pure noise; shares refer to it if count is None.
    """

    index: int
    count: int | None
    progress: float | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The dense part of a run; everything is sparse by default.

    Args:
        dense_steps, dense_last_steps: first and last denoising steps that stay dense: a number (int), or a share of
            all steps (float in [0, 1]). A share above 0 is rounded half up and means at least one.
        dense_layers: first layers that stay dense, in the order they run: a number, a share, or a tuple of indices.

    Raises:
        DitAccelError: a value is none of these.
    """

    dense_steps: Amount = 0
    dense_last_steps: Amount = 0
    dense_layers: Amount | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in STEPS:
            _check_amount(name, getattr(self, name), "an int >= 0 or a float in [0, 1]")
        if not isinstance(self.dense_layers, tuple):
            _check_amount("dense_layers", self.dense_layers, "an int >= 0, a float in [0, 1] or a tuple of indices")
            return
        for index in self.dense_layers:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise DitAccelError(f"dense_layers as a tuple holds layer indices >= 0, got {index!r}.")

    @property
    def by_step(self) -> bool:
        """Whether the answer depends on the denoising step."""
        return any(self._ends)

    def remark(self, steps: int) -> str | None:
        """A sentence about a run of so many steps in which all stay dense, or more than a share asks for."""
        return self._all_dense(steps) or self._rounded(steps)

    def _rounded(self, steps: int) -> str | None:
        """Of few steps: a share of less than half a step still keeps one dense."""
        shares = {name: value for name in STEPS if isinstance(value := getattr(self, name), float)}
        small = [f"{name}={value}" for name, value in shares.items() if 0 < value * steps < 0.5]
        if not small:
            return None
        apart = " each" if len(small) > 1 else ""
        shown = f"{' and '.join(small)} of {steps} steps"
        return f"{shown} is less than half a step{apart} and keeps 1 dense{apart}: give numbers of steps"

    def _all_dense(self, steps: int) -> str | None:
        if sum(_amount_of(amount, steps) for amount in self._ends) < steps:
            return None
        said = " and ".join(f"{name}={value}" for name in STEPS if (value := getattr(self, name)))
        return f"{said} of {steps} steps leaves no sparse step: the run is dense"

    def layers(self, total: int) -> frozenset[int]:
        """Indices of the dense layers among `total`."""
        if isinstance(self.dense_layers, tuple):
            beyond = [index for index in self.dense_layers if index >= total]
            if beyond:
                raise DitAccelError(f"dense_layers names layer {beyond[0]}, but the model has layers 0 to {total - 1}.")
            return frozenset(self.dense_layers)
        if isinstance(self.dense_layers, int) and self.dense_layers > total:
            raise DitAccelError(f"dense_layers={self.dense_layers}, but the model has {total} layers.")
        return frozenset(range(_amount_of(self.dense_layers, total)))

    def dense_step(self, step: Step) -> str | None:
        """Why this step is dense, or None if it is not.

        Raises:
            DitAccelError: `dense_last_steps` is a number of steps and the trajectory's length is unknown.
        """
        if step.count is not None:
            first = step.index < _amount_of(self.dense_steps, step.count)
        elif isinstance(self.dense_steps, int):
            first = step.index < self.dense_steps
        else:
            first = step.progress is not None and step.progress < self.dense_steps
        if first:
            return f"dense_steps={self.dense_steps}"
        if self._is_last(step):
            return f"dense_last_steps={self.dense_last_steps}"
        return None

    def place(self, step: Step, hold: int = 1) -> float:
        """Where a step lies between the first sparse step, 0, and the last, 1, for ramps.

        Dense steps lie at the nearer end, and a single sparse step at 0.

        Args:
            hold: so many sparse steps lie where the first of them does.

        Raises:
            DitAccelError: `hold` is above 1 and the trajectory's length is unknown.
        """
        if step.count is None:
            if hold > 1:
                raise DitAccelError(
                    f"A ramp with refresh={hold} needs the number of steps, which a transformer alone does not have. "
                    "Call set_step(i, n) before each step, or accelerate the pipeline."
                )
            first, last = (float(share) if isinstance(share, float) else 0.0 for share in self._ends)
            span = 1 - first - last
            return min(max(((step.progress or 0.0) - first) / span, 0.0), 1.0) if span > 0 else 0.0
        first, last = (_amount_of(amount, step.count) for amount in self._ends)
        span = max(0, step.count - last - first - 1)
        index = min(max(step.index - first, 0), span)
        return (index - index % hold) / span if span else 0.0

    @property
    def _ends(self) -> tuple[Amount, Amount]:
        return self.dense_steps, self.dense_last_steps

    def _is_last(self, step: Step) -> bool:
        if not self.dense_last_steps:
            return False
        if step.count is not None:
            return step.index >= step.count - _amount_of(self.dense_last_steps, step.count)
        if isinstance(self.dense_last_steps, int):
            raise DitAccelError(
                f"dense_last_steps={self.dense_last_steps} needs the number of steps, which a transformer alone does "
                "not have. Call set_step(i, n) before each step, give a share such as 0.1, or accelerate the pipeline."
            )
        return step.progress is not None and step.progress >= 1 - self.dense_last_steps


def _check_amount(name: str, value: object, wanted: str) -> None:
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not count and not (isinstance(value, float) and 0 <= value <= 1):
        raise DitAccelError(f"{name} must be {wanted}, got {value!r}.")


def _amount_of(value: Amount, total: int) -> int:
    if isinstance(value, int):
        return min(value, total)
    return max(1, math.floor(value * total + 0.5)) if value else 0
