"""The attention back end of dense steps and layers, by its name in Diffusers' dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dit_accel.errors import DitAccelError

AUTO = "auto"
HOPPER = (9, 0)


def choose(name: str, device: torch.device) -> tuple[str | None, str]:
    """The back end for dense calls, None for the model's own, and the reason.

    "auto" takes back ends that compute the same result, masks included: neither quantised ones nor FlashAttention 3.
    That is cuDNN on Hopper and later, where PyTorch chooses FlashAttention 2. Elsewhere PyTorch chooses the fastest.

    Args:
        name: "auto" or a name of Diffusers' dispatcher.

    Raises:
        DitAccelError: the name is unknown, or the back end cannot run here.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    if name == AUTO:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
            return "_native_cudnn", "the fastest with masks on this architecture"
        return None, f"PyTorch's own choice is the fastest with masks on {device.type} here"
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise DitAccelError(f"dense_backend is {AUTO!r} or one of {', '.join(known)}; got {name!r}.")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise DitAccelError(f"dense_backend={name!r} cannot run here: {error}") from error
    return name, "asked for"


class DenseBackend:
    """Sets a back end on the model's own processors, and undoes it.

    Args:
        name, device: as for `choose`, whose errors it raises.
        processors: the model's own, of the accelerated layers.

    Attributes:
        note: for the report.
    """

    def __init__(self, name: str, device: torch.device, processors: Iterable[Any]) -> None:
        self._name, why = choose(name, device)
        distinct = list({id(processor): processor for processor in processors}.values())
        through = [processor for processor in distinct if hasattr(processor, "_attention_backend")]
        self._processors = [processor for processor in through if processor._attention_backend is None]
        shown = "the model's own" if self._name is None else self._name
        self.note = f"dense attention runs on {shown}: {why}"
        if self._name is not None and len(self._processors) < len(distinct):
            self.note += (
                f"; {len(distinct) - len(through)} of {len(distinct)} processors do not use Diffusers' dispatcher, and "
                f"{len(through) - len(self._processors)} have a back end set already"
            )

    def set(self) -> None:
        for processor in self._processors:
            processor._attention_backend = self._name

    def undo(self) -> None:
        """Remove the back end from processors that still have ours."""
        for processor in self._processors:
            if processor._attention_backend == self._name:
                processor._attention_backend = None
