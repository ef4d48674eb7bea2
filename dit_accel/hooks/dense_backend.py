"""The attention back end of dense steps and layers, by its name in Diffusers' dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.hooks.verified_backend import Verified

if TYPE_CHECKING:
    from dit_accel.hooks.accelerated_layer import AcceleratedLayer

AUTO, AUTO8 = "auto", "auto8"
HOPPER = (9, 0)


def choose(name: str, device: torch.device) -> tuple[str | None, str]:
    """The back end for dense calls, None for the model's own, and the reason.

    "auto" takes back ends that compute the same result, masks included: neither quantised ones nor FlashAttention 3.
    That is cuDNN on Hopper and later, where PyTorch chooses FlashAttention 2. Elsewhere PyTorch chooses the fastest.
    "auto8" has the same, until a call has verified another one (`verified_backend`).

    Args:
        name: "auto", "auto8" or a name of Diffusers' dispatcher.

    Raises:
        DitAccelError: the name is unknown, or the back end cannot run here.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    if name in (AUTO, AUTO8):
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
            return "_native_cudnn", "the fastest with masks on this architecture"
        return None, f"PyTorch's own choice is the fastest with masks on {device.type} here"
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise DitAccelError(f"dense_backend is {AUTO!r}, {AUTO8!r} or one of {', '.join(known)}; got {name!r}.")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise DitAccelError(f"dense_backend={name!r} cannot run here: {error}") from error
    return name, "asked for"


class DenseBackend:
    """Sets a back end on the model's own processors, and undoes it.

    Args:
        name, device: as for `choose`, whose errors it raises; without a name it does nothing.
        layers: the accelerated ones.
    """

    def __init__(self, name: str | None, device: torch.device, layers: Iterable[AcceleratedLayer]) -> None:
        self._layers, self._auto8 = list(layers), name == AUTO8
        self._name, self._why = (None, "") if name is None else choose(name, device)
        self._by_name = name is not None
        self._verified: Verified | None = None
        self._processors: list[Any] = []
        self._note: str | None = None

    @property
    def notes(self) -> list[str]:
        """For the report."""
        verified = [] if self._verified is None else self._verified.notes
        return verified if self._note is None else [*verified, self._note]

    def set(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName, _maybe_download_kernel_for_backend

        if not self._by_name:
            return
        if self._name is not None:
            _maybe_download_kernel_for_backend(AttentionBackendName(self._name))
        distinct = list({id(layer.original): layer.original for layer in self._layers}.values())
        through = [processor for processor in distinct if hasattr(processor, "_attention_backend")]
        self._processors = [processor for processor in through if processor._attention_backend is None]
        for processor in self._processors:
            processor._attention_backend = self._name
        others = (
            f"{len(distinct) - len(through)} of {len(distinct)} processors do not use Diffusers' dispatcher, and "
            f"{len(through) - len(self._processors)} have a back end set already"
        )
        fewer = len(self._processors) < len(distinct)
        if self._auto8:
            self._note = f"auto8: {others}" if fewer else None
            self._verify()
            return
        shown = "the model's own" if self._name is None else self._name
        self._note = f"dense attention runs on {shown}: {self._why}"
        if self._name is not None and fewer:
            self._note += f"; {others}"

    def _verify(self) -> None:
        """Have the layers whose back end is ours verify others in their first dense calls."""
        if self._verified is None:
            self._verified = Verified(self._name)
        ours = {id(processor) for processor in self._processors}
        for layer in self._layers:
            if self._verified.candidates and id(layer.original) in ours:
                layer.ours.dense_call = functools.partial(self._verified.run, layer.name, layer.original)

    def check(self, compiled: Callable[[], bool]) -> None:
        """Refuse a compiled call that cannot be verified; `compiled` says whether a part of the transformer is.

        Raises:
            DitAccelError: nothing has been verified before compiling, or gradients are enabled.
        """
        if self._verified is None or not self._verified.candidates or not compiled():
            return
        if torch.is_grad_enabled():
            raise DitAccelError(f"dense_backend={AUTO8!r} has no gradients. Train with {AUTO!r}, or without it.")
        if not self._verified.called:
            raise DitAccelError(
                f"This transformer is compiled, and dense_backend={AUTO8!r} cannot verify a compiled call. Call it "
                "once before compiling it; layers that were dense then keep what was chosen."
            )

    def undo(self) -> None:
        """Remove the back end from processors that still have ours."""
        # a list: members of Diffusers' enumeration equal their names, and have other hashes
        backends = [self._name] if self._verified is None else [self._name, *self._verified.candidates]
        for processor in self._processors:
            if processor._attention_backend in backends:
                processor._attention_backend = None
        for layer in self._layers:
            layer.ours.dense_call = None
