"""What a layer keeps from one denoising step to the next, and block lists among it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.router.portable import lists_of


class KeptLists(NamedTuple):
    """The plan and the denoising step that listed blocks; a bit for each pair of blocks; the width of the lists.

    bits: uint8 [B, H, query blocks, key blocks / 8, rounded up].
    """

    owner: Any
    step: int
    bits: torch.Tensor
    width: int


class ListMemory(NamedTuple):
    """What the calls of one layer share between denoising steps: the step of a call, and what is `kept` by its number.

    number: of the call within the step: guidance in two calls has 0 and 1.
    last: whether no step follows, so nothing need be kept.
    """

    step: int
    number: int
    last: bool
    kept: dict[int, Any]


def kept_or_new(
    memory: ListMemory | None,
    refresh: int,
    owner: Any,
    shape: tuple[int, int, int, int],
    choose: Callable[[], BlockLists],
) -> BlockLists:
    """The lists kept for this call if they are younger than `refresh` steps, else those that `choose` makes.

    Lists of another plan (`owner`) or `shape` (B, H, query blocks, key blocks) are not used. Without `memory` none are.
    """
    if memory is None or refresh == 1:
        return choose()
    blocks, entry = shape[3], memory.kept.get(memory.number)
    powers = 1 << torch.arange(8, device="cpu")
    if (
        entry is not None
        and entry.owner is owner
        and tuple(entry.bits.shape[:3]) == shape[:3]
        and 0 <= memory.step - entry.step < refresh
    ):
        marked = (entry.bits[..., None] & powers.to(entry.bits)) != 0
        return BlockLists(*lists_of(marked.flatten(-2)[..., :blocks], entry.width))
    lists = choose()
    marked = torch.nn.functional.pad(lists.map(lists.used, blocks), (0, -blocks % 8)).unflatten(-1, (-1, 8))
    bits = (marked * powers.to(marked.device)).sum(-1).to(torch.uint8)
    memory.kept[memory.number] = KeptLists(owner, memory.step, bits, lists.indices.shape[-1])
    return lists
