"""The student and its dense teacher: two ways of calling one transformer, and the activations recorded in it.

The teacher is the same transformer with its LoRA off and the accelerator paused. If all weights train, it is a copy of
the untrained model. The student's call comes last: recomputation in the backward pass follows the accelerator's last
call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dit_accel.accelerator import Accelerator
from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.pipelines.family import Family
from dit_accel.train.data import Call, is_row
from dit_accel.train.objectives import Outputs, of_methods


class TrainingNetworks:
    """Calls the student and the teacher.

    Args:
        transformer: the student, accelerated by `accel`, with a LoRA if `lora`.
        lora: turn adapters off while the transformer is its own teacher.
        layers: indices of the self-attention modules whose output is recorded.
        objectives: of the training; they decide what else is recorded (`Outputs`).
        teacher: a copy of the dense model, if all weights train.

    Raises:
        DitAccelError: as for `check_family`, or the output head is unknown.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        accel: Accelerator,
        *,
        lora: bool,
        layers: tuple[int, ...] = (),
        objectives: Collection[str] = (),
        teacher: nn.Module | None = None,
    ) -> None:
        self._transformer, self._accel, self._lora = transformer, accel, lora
        others, hidden = of_methods(), "final" in objectives
        self._recorded = [others[name] for name in objectives if name in others]
        check_family(family)
        if hidden and not hasattr(transformer, "proj_out"):
            raise DitAccelError(
                f"The objective final needs the input of proj_out, which {type(transformer).__name__} does not have. "
                "Choose another, such as teacher."
            )
        assert family.timestep_scale is not None
        self._scale = family.timestep_scale
        self._teacher = transformer if teacher is None else teacher
        self._sink: Outputs | None = None
        self._handles: list[Any] = []
        for network in {id(module): module for module in (transformer, self._teacher)}.values():
            modules = [module for _, module in family.attentions(network)]
            self._handles += [modules[index].register_forward_hook(self._see_attention) for index in layers]
            if hidden:
                head: Any = network.proj_out
                self._handles.append(head.register_forward_pre_hook(self._see_hidden))

    @torch.no_grad()
    def teacher(self, noisy: torch.Tensor, timestep: torch.Tensor, call: Call) -> Outputs:
        """The dense base model's outputs, without gradient; arguments as for `outputs`."""
        with contextlib.ExitStack() as stack:
            if self._teacher is self._transformer:
                stack.enter_context(self._accel.paused())
                if self._lora:
                    self._transformer.disable_adapters()  # type: ignore[operator]
                    stack.callback(self._transformer.enable_adapters)  # type: ignore[arg-type]
            return self.outputs(self._teacher, noisy, timestep, call)

    def guided(
        self, noisy: torch.Tensor, timestep: torch.Tensor, call: Call, negative: Call, scale: float
    ) -> torch.Tensor:
        """The dense base model's prediction with classifier-free guidance, without gradient."""
        positive = self.teacher(noisy, timestep, call).prediction
        if scale == 1:
            return positive
        empty = self.teacher(noisy, timestep, negative).prediction
        return empty + scale * (positive - empty)

    def outputs(self, model: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, call: Call) -> Outputs:
        """The outputs of a transformer, such as the accelerated student.

        Args:
            model: the transformer, as Hugging Face accelerate prepared it.
            noisy: [B, ...] latents.
            timestep: [B], in the scheduler's units.
        """
        dtype: torch.dtype = self._transformer.dtype  # type: ignore[assignment]
        arguments = dict(call)
        for name, value in call.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(noisy.device, dtype if value.is_floating_point() else value.dtype)
        self._sink = Outputs(noisy)
        try:
            with self._accel.watch(self._see_call) if self._recorded else contextlib.nullcontext():
                prediction = model(
                    hidden_states=noisy.to(dtype),
                    timestep=timestep.to(noisy.device) / self._scale,
                    **arguments,
                    return_dict=False,
                )[0]
            outputs = self._sink
        finally:
            self._sink = None
        outputs.prediction = prediction.float()
        return outputs

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _see_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._sink is not None:  # None while activations are recomputed
            self._sink.attention += output if isinstance(output, tuple) else (output,)

    def _see_call(self, call: ComputedAttention) -> None:
        for objective in () if self._sink is None else self._recorded:
            with torch.no_grad():
                record = objective.record(call)
            if record is not None and self._sink is not None:
                self._sink.records.setdefault(objective.name, []).append(record)

    def _see_hidden(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._sink is not None:
            self._sink.hidden = args[0]


def check_family(family: Family) -> None:
    """Refuse a family whose timestep is not the noise level times a factor, or that denoises a second stream too."""
    # with rising time the model predicts the opposite direction
    if family.timestep_scale is None or family.timestep_rises:
        raise DitAccelError(
            f"The timestep of the family {family.name} is not its noise level times a factor, so training does not "
            "cover it. Train another model."
        )
    if family.stack.both:
        raise DitAccelError(
            f"The family {family.name} denoises sound beside the video, and training data hold the video alone. Train "
            "another model."
        )


def expanded(call: Call, batch: int) -> Call:
    """The conditioning of one sample repeated for a batch."""
    return {name: value.expand(batch, *value.shape[1:]) if is_row(value) else value for name, value in call.items()}
