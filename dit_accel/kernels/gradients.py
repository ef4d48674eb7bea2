"""Gradients of the custom ops of kernels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def register_gradients(forward: Any, backward: Any) -> None:
    """Let a custom op compute the gradients of another.

    Args:
        forward: `forward(*tensors, *settings) -> outputs`; some tensors may be None, and no setting is.
        backward: `backward(*gradients, *outputs, tensors, *settings)`, the gradients of the first tensors. Only the
            gradient of the first output is always a tensor.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = list(itertools.takewhile(lambda value: value is None or isinstance(value, Tensor), inputs))
        ctx.settings = inputs[len(tensors) :]
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, first: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)  # recomputed activations can be read once
        outputs, tensors = saved[: 1 + len(others)], saved[1 + len(others) :]
        first = torch.zeros_like(outputs[0]) if first is None else first
        results = backward(first, *others, *outputs, tensors, *ctx.settings)
        return *results, *[None] * (len(tensors) + len(ctx.settings) - len(results))

    forward.register_autograd(differentiate, setup_context=save)
