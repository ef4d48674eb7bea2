"""Results that a layer reuses in later denoising steps, such as block lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.router.portable import lists_of


class StoredLists(NamedTuple):
    """Block lists as bits, with the plan and the step that they come from.

    Attributes:
        owner: the plan.
        step: index of the denoising step.
        bits: a bit for each pair of blocks, uint8 [B, H, query blocks, key blocks / 8, rounded up].
        width: entries in a list.
    """

    owner: Any
    step: int
    bits: torch.Tensor
    width: int


class ListMemory(NamedTuple):
    """The memory of one layer between denoising steps, as one of its calls sees it.

    Attributes:
        step: index of the call's denoising step.
        number: index of the call within the step; guidance in two calls has 0 and 1.
        last: whether this is the last step, behind which nothing is kept.
        stored: results, by the call's number.
    """

    step: int
    number: int
    last: bool
    stored: dict[int, Any]


def recalled_lists(
    memory: ListMemory | None,
    refresh: int,
    owner: Any,
    shape: tuple[int, int, int, int],
    choose: Callable[[], BlockLists],
) -> BlockLists:
    """The stored lists of this call if they are younger than `refresh` steps; otherwise `choose` makes new ones.

    Lists of another plan (`owner`) or another `shape` (B, H, query blocks, key blocks) are not reused. Without `memory`
    no lists are.
    """
    if memory is None or refresh == 1:
        return choose()
    blocks, entry = shape[3], memory.stored.pop(memory.number, None)
    powers = 1 << torch.arange(8, device="cpu")
    if (
        entry is not None
        and entry.owner is owner
        and tuple(entry.bits.shape[:3]) == shape[:3]
        and 0 <= memory.step - entry.step < refresh
    ):
        if not memory.last:
            memory.stored[memory.number] = entry
        marked = (entry.bits[..., None] & powers.to(entry.bits)) != 0
        return BlockLists(*lists_of(marked.flatten(-2)[..., :blocks], entry.width))
    lists = choose()
    if memory.last:
        return lists
    marked = torch.nn.functional.pad(lists.map(lists.used, blocks), (0, -blocks % 8)).unflatten(-1, (-1, 8))
    bits = (marked * powers.to(marked.device)).sum(-1).to(torch.uint8)
    memory.stored[memory.number] = StoredLists(owner, memory.step, bits, lists.indices.shape[-1])
    return lists
