"""Faster Diffusers diffusion transformers: swap the attention of an unmodified pipeline, and see what it cost.

The public names load on first use, so that ``import dit_accel`` needs torch alone and costs next to nothing more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.accelerator import Accelerator, accelerate, accelerated
    from dit_accel.checkpoint.load import load
    from dit_accel.errors import DitAccelError
    from dit_accel.hooks.parallelize import parallelize
    from dit_accel.plans.plan import Plan, attention
    from dit_accel.registry import list_families, list_methods, plan
    from dit_accel.setting import Setting
    from dit_accel.tokens import TokenGrid

__version__ = "0.1.0"

__all__ = [
    "Accelerator",
    "DitAccelError",
    "Plan",
    "Setting",
    "TokenGrid",
    "accelerate",
    "accelerated",
    "attention",
    "list_families",
    "list_methods",
    "load",
    "parallelize",
    "plan",
]

_HOME = {
    "Accelerator": "accelerator",
    "accelerate": "accelerator",
    "accelerated": "accelerator",
    "load": "checkpoint.load",
    "DitAccelError": "errors",
    "parallelize": "hooks.parallelize",
    "Plan": "plans.plan",
    "attention": "plans.plan",
    "plan": "registry",
    "list_families": "registry",
    "list_methods": "registry",
    "Setting": "setting",
    "TokenGrid": "tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"dit_accel.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
