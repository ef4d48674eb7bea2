"""Adapters for MiniMax-H3: differences from the base weights, and new weights beside them.

A linear layer becomes W + s B A, with A [rank, in] (`lora_A`, `lora_down`) and B [out, rank] (`lora_B`, `lora_up`).
`.diff` and `.diff_b` are then added to weight and bias, and `.set_weight` is a weight that the base model lacks.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch

from dit_accel.checkpoint.model_weights import NewWeight
from dit_accel.checkpoint.weight_files import StoredModel, StoredTensor
from dit_accel.errors import DitAccelError

PREFIX = re.compile(r"^(base_model\.model\.|(model\.)?diffusion_model\.|transformer\.)")
ENDING = re.compile(
    r"(?P<layer>.+)\.(?:(?P<A>lora_A(\.default)?\.weight|lora[._]down\.weight)"
    r"|(?P<B>lora_B(\.default)?\.weight|lora[._]up\.weight)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<set>set_weight))"
)
BLOCK = r"(transformer_blocks|token_refiner\.refiner_blocks)\.\d+\."
PROJECTION = re.compile(BLOCK + r"(attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))\.weight")


def is_edited(name: str) -> bool:
    """Whether every published adapter changes that base weight: attention and feed-forward of each block."""
    return PROJECTION.fullmatch(name) is not None


def layers(model: StoredModel) -> dict[str, dict[str, StoredTensor]]:
    """The tensors by layer and part: A, B, diff, diff_b or set.

    Raises:
        DitAccelError: a tensor is none of these parts, or a layer has two of one part, or A without B.
    """
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, stored in model.tensors.items():
        match = ENDING.fullmatch(PREFIX.sub("", name))
        if match is None:
            raise DitAccelError(f"{stored.file} holds {name}, which is no part of an adapter for MiniMax-H3.")
        part = next(part for part in ("A", "B", "diff", "diff_b", "set") if match[part])
        if parts[match["layer"]].setdefault(part, stored) is not stored:
            raise DitAccelError(f"{stored.file} holds {name} under two names. Fetch it again.")
    for layer, present in parts.items():
        if len(pair := present.keys() & {"A", "B"}) == 1:
            raise DitAccelError(f"{model.files[0]} lacks the {'B' if 'A' in pair else 'A'} of {layer}. Fetch it again.")
    return parts


def read(model: StoredModel, alpha: float | None = None) -> tuple[dict[str, NewWeight], dict[str, NewWeight]]:
    """The weights that an adapter changes and those that it adds, by their names in Diffusers' class.

    Args:
        alpha: s is alpha / rank; None: s is 1.

    Raises:
        DitAccelError: as for `layers`, or the shapes of a layer's parts contradict each other.
    """
    changed, added = {}, {}
    for layer, parts in layers(model).items():
        if "A" in parts or "diff" in parts:
            changed[f"{layer}.weight"] = _moved([parts[part] for part in ("B", "A", "diff") if part in parts], alpha)
        if "diff_b" in parts:
            changed[f"{layer}.bias"] = _moved([parts["diff_b"]], alpha)
        if "set" in parts:
            added[f"{layer}.weight"] = NewWeight.of(parts["set"])
    return changed, added


def _moved(parts: list[StoredTensor], alpha: float | None) -> NewWeight:
    """A base weight with B A and a difference added, or with one of both; sums are in float32 or wider."""
    up, down = parts[:2] if len(parts) > 1 else (None, None)
    difference = parts[-1] if len(parts) != 2 else None
    shape = parts[-1].shape
    if up is not None and down is not None:
        if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0]:
            raise DitAccelError(f"{up.key} {up.shape} and {down.key} {down.shape} of {up.file} are no pair.")
        shape = up.shape[0], down.shape[1]
        if difference is not None and difference.shape != shape:
            raise DitAccelError(f"{difference.key} of {up.file} is {difference.shape}, and its pair makes {shape}.")

    def make(old: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(old.dtype, torch.float32)
        new = old.to(wide)
        if up is not None and down is not None:
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            new = new + scale * (up.read().to(new) @ down.read().to(new))
        return new if difference is None else new + difference.read().to(new)

    return NewWeight(tuple(part.key for part in parts), shape, make)
