"""The size of a model's weights, from its JSON files alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dit_accel.errors import DitAccelError, first_line

if TYPE_CHECKING:
    import torch

    from dit_accel.generation.sources import Source


def weight_bytes(source: Source, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each component with weights, in that dtype, by name; read from its JSON files alone."""
    import torch
    from diffusers import pipelines

    sizes = {}
    for name, entry in source.index.items():
        if not isinstance(entry, list) or entry[0] is None or not (source.folder / name / "config.json").is_file():
            continue  # a tokenizer, a scheduler, a setting, or a part that this pipeline goes without
        try:
            # A class of a pipeline's own package, such as LTX-2's connectors, has that package's name alone.
            library = getattr(pipelines, entry[0], None) or importlib.import_module(entry[0])
            cls, config = getattr(library, entry[1]), source.config(name)
            with torch.device("meta"):
                of_transformers = entry[0] == "transformers"
                module = cls(cls.config_class.from_dict(config)) if of_transformers else cls.from_config(config)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            raise DitAccelError(
                f"The size of {name} of {source.model} is unknown: {entry[0]} has no {entry[1]} that its configuration "
                f"describes ({first_line(error)})."
            ) from error
        sizes[name] = sum(weight.numel() for weight in module.parameters()) * dtype.itemsize
    return sizes
