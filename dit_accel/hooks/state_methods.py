"""A model's `save_pretrained` and `load_state_dict` while learned weights are a part of the model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from dit_accel import registry


class StateMethods:
    """Replaces a transformer's two methods, and undoes it.

    Args:
        transformer: which may have methods of its user's own as attributes; ours call those.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        # by name: ours, and the user's own attribute that it replaces
        self._replaced: dict[str, tuple[Any, Any | None]] = {}

    def set(self) -> None:
        attributes = vars(self._transformer)
        for name, around in (("save_pretrained", without_learned), ("load_state_dict", naming_remove)):
            present: Any = getattr(self._transformer, name, None)
            if present is not None:
                # a copied transformer binds a method to the copy
                ours = types.MethodType(
                    around(getattr(present, "__func__", None) or _taking_self(present)), self._transformer
                )
                self._replaced[name] = ours, attributes.get(name)
                attributes[name] = ours

    def undo(self) -> None:
        """Put back what `set` replaced, where nobody has set another method since."""
        attributes = vars(self._transformer)
        for name, (ours, before) in self._replaced.items():
            if attributes.get(name) is not ours:
                continue
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before
        self._replaced = {}


def _taking_self(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a method, which leaves out the module that it is given."""

    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def naming_remove(load: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `load_state_dict`, whose error says what to do where a state lacks the method's learned weights."""

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except RuntimeError as error:
            if not any(f".{name}." in str(error) for name in registry.learned_attributes()):
                raise
            raise RuntimeError(
                f"{error}\nAn accelerator's learned weights are part of this model while it is at work, as those of a "
                "PEFT adapter are. Call its remove() before loading the model's own weights, or pass strict=False."
            ) from error

    return load_state_dict


def without_learned(save: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `save_pretrained` that writes the model's own weights: the accelerator saves the learned ones."""

    @functools.wraps(save)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        learned = registry.learned_attributes()
        parts = [(module, name) for module in self.modules() for name in learned if name in module._modules]
        taken_out = [(module, name, module._modules.pop(name)) for module, name in parts]
        try:
            return save(self, *args, **kwargs)
        finally:
            for module, name, part in taken_out:
                module._modules[name] = part

    return save_pretrained
