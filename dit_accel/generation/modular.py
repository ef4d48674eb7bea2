"""Modular pipelines of Diffusers: their arguments, progress bars and components are those of the blocks that run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from diffusers import ModularPipeline

INDEX = "modular_model_index.json"


def is_modular(kind: type) -> bool:
    """Whether a pipeline's class is a modular one."""
    from diffusers import ModularPipeline

    return issubclass(kind, ModularPipeline)


def parameters(kind: type, inputs: Iterable[str]) -> dict[str, inspect.Parameter]:
    """The arguments of a call, by name; the names in `inputs` decide which blocks run."""
    import diffusers

    blocks = getattr(diffusers, kind.default_blocks_name)()  # type: ignore[attr-defined]
    parameters_by_name = {}
    for parameter in blocks.get_execution_blocks(**dict.fromkeys(inputs, True)).inputs:
        if parameter.name is not None:
            default = inspect.Parameter.empty if parameter.required and parameter.default is None else parameter.default
            hint = parameter.type_hint or (Any if parameter.default is None else type(parameter.default))
            parameters_by_name[parameter.name] = inspect.Parameter(
                parameter.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
    return parameters_by_name


def loops(blocks: Any) -> Iterator[Any]:
    """The blocks that have a progress bar, among these and those inside them."""
    if hasattr(blocks, "progress_bar"):
        yield blocks
    for block in blocks.sub_blocks.values():
        yield from loops(block)


def load(
    where: str | Path,
    revision: str | None,
    dtypes: dict[str, torch.dtype],
    inputs: Iterable[str],
    offload_to: torch.device | None,
    configs: Mapping[str, Any],
    parts: Mapping[str, Any],
) -> ModularPipeline:
    """Load a modular pipeline with the components of the blocks that run, from safetensors; errors are Diffusers' own.

    `dtypes` are by component, and of others under "default"; `inputs` are as in `parameters`. Whole models move to
    `offload_to` when they run; None: they stay where they are put. `configs` quantise components of these names, and
    `parts` stand in for them.
    """
    from diffusers import ComponentsManager, ModelMixin, ModularPipeline
    from transformers import PreTrainedModel

    manager = None if offload_to is None else ComponentsManager()
    pipe = ModularPipeline.from_pretrained(
        str(where), revision=revision, trust_remote_code=False, components_manager=manager
    )
    blocks = pipe.blocks.get_execution_blocks(**dict.fromkeys(inputs, True))
    for name in (spec.name for spec in blocks.expected_components):
        spec = pipe.get_component_spec(name)
        if spec.default_creation_method != "from_pretrained":
            continue
        if name in parts:
            pipe.register_components(**{name: parts[name]})
            continue
        safe = {"quantization_config": configs[name]} if name in configs else {}
        if isinstance(spec.type_hint, type) and issubclass(spec.type_hint, ModelMixin | PreTrainedModel):
            safe |= {"dtype": dtypes.get(name, dtypes["default"]), "use_safetensors": True}
        pipe.register_components(**{name: spec.load(**safe)})
    if manager is not None:
        manager.enable_auto_cpu_offload(device=offload_to)
    return pipe
