"""A Diffusers scheduler at given noise levels, which distilled weights are sampled by.

With noise levels s of rectified flow, x = (1 - s) x0 + s noise and the model's velocity v = noise - x0, a step is

    SDE:  x <- (1 - s') (x - s v) + s' noise      * fresh noise; s' is the next level, 0 at the end
    ODE:  x <- x - (s - s') v

MiniMax-H3 has conventions of its own: its velocity points to the data, its timesteps are 1 - s, and the number of steps
that a call names counts the 0 at the end.

Source: TurboDiffusion (turbodiffusion/inference/wan2.1_t2v_infer.py) and FastVideo
(fastvideo/pipelines/stages/denoising.py), which both run it so.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from dit_accel.errors import DitAccelError

TRAINING_STEPS = 1000


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """A Diffusers scheduler of flow matching at given noise levels; all arithmetic is in float32.

    Args:
        sigmas, timesteps, ode: as of `few_steps.Sampler`.
        dataward: the conventions of MiniMax-H3.

    Attributes:
        generator: of the fresh noise, one or one a sample; None: PyTorch's global seed.
        init_noise_sigma: what the pipeline's noise is multiplied by before the first step.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: tuple[float, ...] = (1.0,),
        timesteps: tuple[float, ...] | None = None,
        ode: bool = False,
        dataward: bool = False,
        num_train_timesteps: int = TRAINING_STEPS,
    ) -> None:
        self.init_noise_sigma = sigmas[0]
        self.generator: torch.Generator | list[torch.Generator] | None = None
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._set(len(sigmas), None)

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def _set(self, steps: int, device: torch.device | str | None) -> None:
        """The first `steps` levels with 0 behind them: float32 [steps + 1], and their timesteps, float32 [steps]."""
        config: Any = self.config
        levels = torch.tensor([*config.sigmas[:steps], 0.0], dtype=torch.float64)
        dataward = config.dataward
        scaled = 1 - levels[:-1].float() if dataward else (TRAINING_STEPS * levels[:-1]).to(torch.bfloat16)
        timesteps = scaled if config.timesteps is None else torch.tensor(config.timesteps[:steps])
        self.sigmas, self.timesteps = levels.float().to(device), timesteps.float().to(device)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begin a trajectory.

        Raises:
            DitAccelError: these weights were not distilled for so many steps.
        """
        most, end = len(self.config["sigmas"]), int(self.config["dataward"])
        if not 1 + end <= num_inference_steps <= most + end:
            raise DitAccelError(
                f"These weights take num_inference_steps from {1 + end} to {most + end}, got {num_inference_steps}. "
                "Leave it out, or choose among these."
            )
        self._set(num_inference_steps - end, device)
        self.num_inference_steps, self._step_index, self._begin_index = len(self.timesteps), None, None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float, noise: torch.Tensor) -> torch.Tensor:
        """A sample at the noise level of any timestep, as pictures are that a video is conditioned on."""
        level = 1 - timestep if self.config["dataward"] else timestep / TRAINING_STEPS
        return (1 - level) * sample + level * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step: float32, shaped as `sample`, from the model's velocity."""
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._index_of(timestep)
        now, after = self.sigmas[self._step_index], self.sigmas[self._step_index + 1]
        self._step_index += 1
        x, v = sample.float(), -model_output.float() if self.config["dataward"] else model_output.float()
        if self.config["ode"]:
            out = x - (now - after) * v
        else:
            out = (1 - after) * (x - now * v)
            if self._step_index < len(self.timesteps):
                source = self.generator if generator is None else generator
                out = out + after * randn_tensor(x.shape, generator=source, device=x.device, dtype=torch.float32)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        return int((self.timesteps - float(timestep)).abs().argmin())

    def __len__(self) -> int:
        return TRAINING_STEPS
