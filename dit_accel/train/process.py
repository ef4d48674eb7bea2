"""How a model was trained to remove noise, read from its scheduler: noise levels, noisy samples and targets.

`LevelSegments` has the levels and targets of consistency distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.train.settings import LevelSettings

TRAIN_STEPS = 1000

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Flow:
    """Rectified flow: x = (1 − σ)·clean + σ·noise. A level is σ in [0, 1]; levels of samples are [B].

    Args:
        shift: how far the scheduler moves its levels towards noise.
        sample: whether the model predicts the clean sample; otherwise the velocity, noise − clean.
    """

    def __init__(self, shift: float, sample: bool = False) -> None:
        self.shift, self.sample = shift, sample

    def draw(self, batch: int, settings: LevelSettings, generator: torch.Generator) -> torch.Tensor:
        """Noise levels for training, float32 [batch] on the CPU."""
        normal = torch.randn(batch, generator=generator)
        uniform, choice = torch.rand(2, batch, generator=generator)
        level = torch.where(choice < settings.uniform, uniform, torch.sigmoid(settings.mean + settings.std * normal))
        return _shifted(level, self.shift if settings.shift is None else settings.shift)

    def even(self, share: float) -> torch.Tensor:
        """The quantile of the scheduler's own levels at a share, float32 [1]."""
        return _shifted(torch.tensor([share]), self.shift)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The sample at a noise level, in the shape of `clean`."""
        sigma = per_sample(level, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """What the model should predict, in the shape of `clean`."""
        return clean if self.sample else noise - clean

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """The timestep in the scheduler's units (0 to 1000)."""
        return level * TRAIN_STEPS

    def velocity(self, prediction: torch.Tensor, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """A prediction at levels above 0 as a velocity, in its shape."""
        return (noisy - prediction) / per_sample(level, noisy) if self.sample else prediction

    def prediction(self, velocity: torch.Tensor, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """A velocity as a prediction; the inverse of `velocity`."""
        return noisy - per_sample(level, noisy) * velocity if self.sample else velocity


class Diffusion:
    """Discrete diffusion (DDPM): x = √ᾱ·clean + √(1 − ᾱ)·noise. A level is a step of the training schedule.

    It has the methods of `Flow`, except those of velocities.

    Args:
        alphas_cumprod: ᾱ of each step, float [1000].
        prediction: "epsilon" (the noise), "v_prediction" (√ᾱ·noise − √(1 − ᾱ)·clean) or "sample" (the clean sample).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: str) -> None:
        self.alphas, self.prediction = alphas_cumprod.float(), prediction

    def draw(self, batch: int, settings: LevelSettings, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(self.alphas), (batch,), generator=generator).float()

    def even(self, share: float) -> torch.Tensor:
        return torch.tensor([float(int(share * len(self.alphas)))])

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        signal, added = self._scales(clean, level)
        return signal * clean + added * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        signal, added = self._scales(clean, level)
        if self.prediction == "epsilon":
            return noise
        return clean if self.prediction == "sample" else signal * noise - added * clean

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level.long()

    def _scales(self, clean: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = per_sample(self.alphas.to(clean.device)[level.long()], clean)
        return alpha.sqrt(), (1 - alpha).sqrt()


NoiseProcess = Flow | Diffusion


def _shifted(level: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * level / (1 + (shift - 1) * level)


def process_of(scheduler: Any, latents: torch.Size) -> NoiseProcess:
    """The noising process of a pipeline's scheduler.

    Args:
        latents: shape of one sample, for schedulers whose shift depends on its length (FLUX).
    """
    config = scheduler.config
    flow_sigmas = config.get("use_flow_sigmas", False)  # a scheduler such as UniPC has both processes
    if config.get("prediction_type") == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch"):
        return Flow(_shift(config, latents))
    if flow_sigmas and config.get("prediction_type") == "sample":
        return Flow(_shift(config, latents), sample=True)
    known = config.get("prediction_type") in ("epsilon", "v_prediction", "sample") and not flow_sigmas
    if known and hasattr(scheduler, "alphas_cumprod"):
        return Diffusion(scheduler.alphas_cumprod, config["prediction_type"])
    raise DitAccelError(
        f"{type(scheduler).__name__} is neither a flow-matching nor a DDPM scheduler, so its targets are unknown. Set "
        "pipe.scheduler to one of these."
    )


def _shift(config: Any, latents: torch.Size) -> float:
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    tokens = latents[1] if len(latents) == 3 else math.prod(latents[2:]) / 4
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    mu = config.get("base_shift", 0.5) + slope * (tokens - low)
    return float(mu if config.get("time_shift_type") == "linear" else math.exp(mu))


def per_sample(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes [B] to [B, 1, ...], with the device and the number of dimensions of `like`."""
    return level.to(like.device).view(-1, *([1] * (like.ndim - 1)))


class LevelSegments:
    """Multi-step consistency distillation: the student samples in as many steps as there are segments.

    Source: Heek et al., "Multistep Consistency Models" (arXiv:2403.06807), as Efficient-vDiT (arXiv:2502.06155, section
    3) uses it on video. The noise levels are cut into segments. In a segment, one Euler step from any point of a
    trajectory should lead to the same point at the segment's end. From a noisy sample x at σ:

    1. The teacher (dense, with guidance) takes one step along its grid, from σ to σ'.
    2. The student, without gradient, jumps from there to the segment's end ε: y = x' + (ε − σ')·v(x', σ').
    3. The student's target at σ is the velocity that leads from x to y in one step: (y − x) / (ε − σ). If a model
       predicts the clean sample, its predictions and targets are converted (`Flow.velocity`).

    If σ' = ε, there is no step 2, and the teacher's step is the target. Both grids are the pipeline's own. So the
    student samples with the unchanged pipeline: in `segments` steps, without guidance.

    Args:
        process: of the pipeline's scheduler.
        ends: levels that the pipeline visits with one step a segment, from noise to 0: float32 [S + 1].
        steps: levels that it visits with the teacher's number of steps: float32 [T + 1].

    Raises:
        DitAccelError: the process is not a flow.
    """

    def __init__(self, process: NoiseProcess, ends: torch.Tensor, steps: torch.Tensor) -> None:
        if not isinstance(process, Flow):
            raise DitAccelError("Consistency distillation needs a flow-matching model. Choose another objective.")
        self.process = process
        levels = sorted({*ends.tolist(), *steps.tolist()}, reverse=True)
        merged = [levels[0]]
        for level in levels[1:]:
            if merged[-1] - level > 1e-6:  # else the same level of both grids, up to rounding
                merged.append(level)
        starts = torch.tensor(merged)
        self.start = starts[:-1]  # [G] levels to train at
        self.next = starts[1:]  # [G] levels after the teacher's step
        below = ends[None, :] < self.start[:, None] - 1e-6
        self.end = torch.where(below, ends[None, :], -1.0).max(1).values  # [G] ends of their segments
        self.next = torch.maximum(self.next, self.end)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of levels, int64 [batch], uniform."""
        return torch.randint(len(self.start), (batch,), generator=generator)

    @torch.no_grad()
    def target(self, noisy: torch.Tensor, index: torch.Tensor, teacher: Predict, student: Predict) -> torch.Tensor:
        """The prediction whose velocity leads to the segment's end, in the shape of `noisy`.

        Args:
            noisy: [B, ...] at the levels `start[index]`.
            index: int64 [B].
            teacher, student: predictions of a sample at levels [B].
        """
        here, there, end = (per_sample(levels[index], noisy) for levels in (self.start, self.next, self.end))
        velocity, start, after = self.process.velocity, self.start[index], self.next[index]
        moved = noisy + (there - here) * velocity(teacher(noisy, start), noisy, start)
        onward = velocity(student(moved, after), moved, after)
        landed = torch.where(there > end + 1e-6, moved + (end - there) * onward, moved)
        return self.process.prediction((landed - noisy) / (end - here), noisy, start)
