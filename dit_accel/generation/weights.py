"""How large a pipeline's weights are, from its JSON files alone, and how much memory is free."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError, first_line

if TYPE_CHECKING:
    import torch

    from dit_accel.generation.sources import Source


def weight_bytes(source: Source, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each component with weights, in that dtype, by name.

    Raises:
        DitAccelError: a configuration is missing, or describes no model that is installed here.
    """
    import torch

    found = {}
    for name, entry in source.index.items():
        if not isinstance(entry, list) or entry[0] is None or not (source.folder / name / "config.json").is_file():
            continue  # a tokenizer, a scheduler, a setting, or a part that this pipeline goes without
        try:
            with torch.device("meta"):
                module = _empty(entry[0], entry[1], source.config(name))
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            raise DitAccelError(
                f"The size of {name} of {source.model} is unknown: {entry[0]} has no {entry[1]} that its configuration "
                f"describes ({first_line(error)})."
            ) from error
        found[name] = sum(weight.numel() for weight in module.parameters()) * dtype.itemsize
    return found


def _empty(library: str, kind: str, config: dict[str, Any]) -> torch.nn.Module:
    """A component without its weights' memory."""
    cls = getattr(importlib.import_module(library), kind)
    if library == "transformers":
        made: torch.nn.Module = cls(cls.config_class.from_dict(config))
        return made
    return cls.from_config(config)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU what the machine says is available."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
