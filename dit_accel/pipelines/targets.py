"""The diffusion transformers of a target, each with its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.refused import refusal
from dit_accel.registry import family_of, list_families


def find_transformers(target: Any) -> tuple[dict[str, tuple[nn.Module, Family]], Any | None]:
    """The transformers of `target` with their families, by component name; and the pipeline, None for a transformer.

    A transformer under two names counts once, under the first.

    Raises:
        DitAccelError: there is none, or one of them is of no supported family.
    """
    components: Any
    if isinstance(target, nn.Module):
        components, pipeline = {"transformer": target}, None
    else:
        components, pipeline = getattr(target, "components", None), target
        if not isinstance(components, Mapping):  # no pipeline of Diffusers: its transformers are attributes
            names = [name for name in dir(target) if name.startswith("transformer")]
            components = {name: getattr(target, name) for name in names}
    transformers: dict[str, tuple[nn.Module, Family]] = {}
    for name, component in components.items():
        module = getattr(component, "_orig_mod", component)
        if not isinstance(module, nn.Module) or any(module is known for known, _ in transformers.values()):
            continue
        names = [base.__name__ for base in type(module).__mro__]
        family = family_of(names)
        if family is not None:
            transformers[name] = (module, family)
        elif pipeline is None or name.startswith("transformer"):
            raise DitAccelError(f"{type(module).__name__} is not supported: {refusal(names)}")
    if not transformers:
        raise DitAccelError(
            f"{type(target).__name__} has no diffusion transformer; pass a Diffusers pipeline, an object with a "
            f"transformer, or a transformer of a supported family: {', '.join(list_families())}."
        )
    return transformers, pipeline
