"""Finds the denoising step and the layer at which a generation stops being finite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


class _Place(Exception):
    """Ends the search; the message is the place."""


def find_place(pipe: DiffusionPipeline, run: Callable[..., Any]) -> str:
    """The place at which a watched run becomes NaN or infinite, such as ``step 3, transformer.blocks.0.attn1``.

    Steps count from 0. A step without a layer means that only the latents after guidance and scheduler are not finite.
    `run` calls the pipeline again, with further keywords.
    """
    import torch

    step = 0
    steps_known = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters

    def after_step(pipe: Any, index: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal step
        step = index + 1
        if not _is_finite(tensors["latents"]):
            raise _Place(f"step {index}, the latents after guidance and scheduler")
        return {}

    def watch(name: str) -> Callable[..., None]:
        def after_layer(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if not _is_finite(output):
                raise _Place(f"step {step}, {name}" if steps_known else name)

        # no order of tokens changes the answer, so an accelerator permutes them as in the run that failed
        after_layer.reads_tokens = False  # type: ignore[attr-defined]
        return after_layer

    more = {"callback_on_step_end": after_step} if steps_known else {}
    hooks = [
        module.register_forward_hook(watch(f"{part}.{name}" if name else part))
        for part, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for name, module in model.named_modules()
    ]
    try:
        run(**more)
    except _Place as place:
        return str(place)
    finally:
        for hook in hooks:
            hook.remove()
    return "the decoding of the latents"


def _is_finite(value: Any) -> bool:
    """Whether all tensors in a value, such as a module's output, are finite."""
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
