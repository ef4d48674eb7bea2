"""The hooks that a cache puts on a transformer, and their exact removal."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

CACHES = (
    "fbc_",
    "mag_cache",
    "taylorseer_cache",
    "sea_cache",
    "faster_cache",
    "pyramid_attention_broadcast",
    "text_kv",
)


@dataclasses.dataclass(frozen=True)
class PlacedHook:
    """One hook in Diffusers' registry of a module.

    Args:
        forward: the module's forward with the hook.
    """

    module: nn.Module
    name: str
    hook: Any
    forward: Any

    @property
    def present(self) -> bool:
        """Whether the hook is on the module still."""
        return _registered(self.module).get(self.name) is self.hook


class PlacedHooks:
    """The hooks on a transformer since a moment.

    Args:
        transformer: as it is before the hooks.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._modules = {
            module: ("forward" in vars(module), "_diffusers_hook" in vars(module)) for module in transformer.modules()
        }
        self._present = {id(hook) for module in self._modules for hook in _registered(module).values()}
        self.hooks: list[PlacedHook] = []

    def collect(self) -> None:
        """Take the hooks that are new now as those to remove."""
        self.hooks = [
            PlacedHook(module, name, hook, module.forward)
            for module in self._modules
            for name, hook in _registered(module).items()
            if id(hook) not in self._present
        ]
        self.invalidate()

    @property
    def managers(self) -> list[Any]:
        """What holds the hooks' states by guidance branch; each once."""
        values = (value for placed in self.hooks for value in vars(placed.hook).values())
        return list({id(value): value for value in values if hasattr(value, "_state_cache")}.values())

    @property
    def stateful(self) -> list[Any]:
        """Hooks with one state, whatever the branch."""
        return [placed.hook for placed in self.hooks if hasattr(placed.hook, "state")]

    @property
    def gone(self) -> bool:
        """Whether somebody else has taken all of them off, as `disable_cache` does."""
        return not any(placed.present for placed in self.hooks)

    def remove(self) -> None:
        """Restore forwards and registries. What was set above a hook since stays, and one that is gone is left out."""
        for placed in reversed(self.hooks):
            if not placed.present:
                continue  # taken off by somebody else, such as disable_cache()
            registry: Any = placed.module._diffusers_hook
            outer, last = vars(placed.module).get("forward"), registry._hook_order[-1] == placed.name
            registry.remove_hook(placed.name, recurse=False)
            if last and outer is not placed.forward:  # that wrapper stays, and the hook passes its calls through
                placed.hook.fn_ref.forward = placed.module.forward
                placed.module.forward = outer  # type: ignore[assignment]
        for module, (forward, registered) in self._modules.items():
            if not registered and "_diffusers_hook" in vars(module) and not _registered(module):
                del module._diffusers_hook
            now = vars(module).get("forward")
            if not forward and getattr(now, "__func__", None) is type(module).forward:
                del module.forward
        self.hooks = []
        self.invalidate()

    def invalidate(self) -> None:
        """Have Diffusers' registries look for hooks anew."""
        for module in self._transformer.modules():
            if (registry := vars(module).get("_diffusers_hook")) is not None:
                registry._child_registries_cache = None


def present_cache(transformer: nn.Module) -> str | None:
    """A cache that somebody put on a transformer, or None."""
    config = getattr(transformer, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    names = [name for module in transformer.modules() for name in _registered(module) if name.startswith(CACHES)]
    if names:
        return names[0]
    return "cache-dit" if getattr(transformer, "_is_cached", False) is True else None


def _registered(module: nn.Module) -> dict[str, Any]:
    """Hooks by name in Diffusers' registry of a module."""
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks
