"""A model's own weights, and replacing them until further notice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dit_accel.checkpoint.weight_files import StoredTensor
from dit_accel.errors import DitAccelError
from dit_accel.registry import learned_attributes

KNOWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def base_weights(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """A model's parameters by name, without a method's learned weights and LoRA adapters."""
    learned = learned_attributes()
    for name, weight in module.named_parameters():
        if ".lora_" not in name and learned.isdisjoint(name.split(".")):
            yield name.replace(".base_layer", ""), weight


@dataclasses.dataclass(frozen=True)
class NewWeight:
    """A tensor that takes the place of one of a model's.

    Args:
        keys: its names in the file.
        shape: its shape, which has to be that of the model's tensor.
        make: makes the tensor from the one that it replaces, which it leaves unchanged.
        int8: reads the int8 values of a matrix and the float32 scale of each tile; None for other tensors.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[torch.Tensor], torch.Tensor]
    int8: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def of(cls, stored: StoredTensor) -> NewWeight:
        """A tensor as it is stored."""
        return cls((stored.key,), stored.shape, lambda old: stored.read())


def every(name: str) -> bool:
    """Whether a weight is needed: always."""
    return True


def check(
    path: object,
    new: Mapping[str, NewWeight],
    shapes: Mapping[str, torch.Size],
    needed: Callable[[str], bool],
    *,
    where: str,
) -> None:
    """Compare names and shapes of new weights with those that they replace.

    Raises:
        DitAccelError: a weight is not the model's or has another shape, or a `needed` one is missing.
    """
    for name, weight in new.items():
        if name not in shapes:
            raise DitAccelError(
                f"{path} holds {weight.keys[0]}, but {where} has no {name}. These weights belong to another model."
            )
        if weight.shape != tuple(shapes[name]):
            raise DitAccelError(
                f"{weight.keys[0]} of {path} makes {name} {weight.shape}, but in {where} it is {tuple(shapes[name])}. "
                "These weights belong to another model, or damaged."
            )
    missing = [name for name in shapes if name not in new and needed(name)]
    if missing:
        raise DitAccelError(
            f"{path} lacks {missing[0]} of {where} ({len(missing)} of {len(shapes)} weights are missing). Fetch it "
            "again."
        )


def check_replaceable(transformer: nn.Module) -> None:
    """Refuse a model whose weights cannot be replaced: quantised, or on the meta device between offloaded calls."""
    for name, weight in base_weights(transformer):
        if weight.is_meta or weight.dtype not in KNOWN_DTYPES or type(weight.data) is not torch.Tensor:
            raise DitAccelError(
                f"The model's weights cannot be replaced: {name} is {weight.dtype} on {weight.device}. Load published "
                "or trained weights before offloading, casting or quantising the model, and remove an accelerator that "
                "keeps weights in int8."
            )


def replace(transformer: nn.Module, new: Mapping[str, NewWeight], *, keep_int8: bool = False) -> Callable[[], None]:
    """Put new weights in place of a model's, in its dtypes and on its devices.

    Old ones wait in main memory. An error restores them. With `keep_int8` matrices that are stored in int8 stay so,
    through torchao: a layer multiplies by int8 values times their scales, rounded to its dtype, as without.

    Returns:
        A function that restores the old weights, bit for bit, wherever the model is by then, and in the dtype that it
        has by then; `check_restorable` comes before it.
    """
    present = dict(base_weights(transformer))
    layers = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()}
    with contextlib.ExitStack() as undo:
        for name, weight in new.items():
            parameter, old = present[name], present[name].data
            if keep_int8 and weight.int8 is not None:
                undo.callback(_put_int8(layers[name.removesuffix(".weight")], parameter, *weight.int8()))
                continue
            # a copy: a file's tensors may begin anywhere, and sums in memory of another alignment round differently
            parameter.data = old.new_empty(old.shape).copy_(weight.make(old).reshape(old.shape))
            owner, _, leaf = name.rpartition(".")
            undo.callback(_put_back, layers[owner], leaf, old.cpu())
        return undo.pop_all().close


def _put_int8(
    layer: nn.Module, parameter: torch.Tensor, whole: torch.Tensor, scale: torch.Tensor
) -> Callable[[], None]:
    """Let a linear layer hold its weight in int8, [out, in], with a scale for each tile; returns what undoes it."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    values, scale = whole.to(parameter.device), scale.float().to(parameter.device)
    tile = values.shape[0] // scale.shape[0], values.shape[1] // scale.shape[1]
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    weight = IntxUnpackedToInt8Tensor(values, scale, zeros, torch.int8, tile, parameter.dtype, None)
    parameter.data = parameter.data.cpu()
    layer.weight = nn.Parameter(weight, requires_grad=False)

    def restore() -> None:
        present: Any = layer.weight
        parameter.data = parameter.data.to(present.device, present.dtype)
        layer.weight = parameter

    return restore


def plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight as an ordinary tensor, which one that is kept in int8 stands for."""
    return weight.detach() if type(weight.data) is torch.Tensor else weight.dequantize()


def _put_back(layer: nn.Module, name: str, old: torch.Tensor) -> None:
    """Give a layer's parameter its old values, in place, because offloading holds on to the tensor."""
    parameter = getattr(layer, name)  # offloading renews it
    place = _offloaded(layer, name) if parameter.is_meta else parameter.data
    assert place is not None  # by `check_restorable`
    with torch.inference_mode():  # which may have made the tensor
        place.copy_(old)
    if not parameter.is_meta and (place.device, place.dtype) == (old.device, old.dtype):
        parameter.data = old  # in its own memory: sums in memory of another alignment round differently


def check_restorable(transformer: nn.Module) -> None:
    """Refuse a model whose weights `replace` could not restore, as they are neither in it nor in main memory."""
    for path, layer in transformer.named_modules():
        for name, weight in layer.named_parameters(recurse=False):
            if weight.is_meta and _offloaded(layer, name) is None:
                raise DitAccelError(
                    f"remove() restores the model's weights, but offloading keeps {path}.{name} where it cannot be "
                    "written. End offloading first, as with the pipeline's remove_all_hooks(), and call remove() again."
                )


def _offloaded(layer: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor in main memory that accelerate's sequential offloading loads a parameter from; None if it is none."""
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None) or {}
        if name in weights:
            stored = weights[name]
            # what is read from a disk is another tensor each time
            return stored if stored is weights[name] and type(stored) is torch.Tensor else None
    return None
