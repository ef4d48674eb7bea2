"""A static plan's block lists on one device, ready for the block-sparse kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from dit_accel.kernels.block_sparse.api import block_sparse_attention, choose_impl, pack
from dit_accel.plans.asked import Asked
from dit_accel.plans.blocks import BlockMask


class Listed(NamedTuple):
    """Block lists, and what the kernel needs besides.

    Args:
        mask: the lists.
        tables: the packed predicate; None if there are no partial blocks.
        decided: how many blocks the tables decide.
        packed: the lists as the Triton kernels read them, where Triton is what runs by default.
    """

    mask: BlockMask
    tables: torch.Tensor | None
    decided: int
    packed: torch.Tensor | None = None

    @classmethod
    def make(cls, mask: BlockMask, tables: Callable[[], torch.Tensor | None], device: torch.device) -> Listed:
        """Put lists on a device; `tables` makes the predicate, where it decides anything."""
        decided = int(mask.partial.sum())
        words = tables() if decided else None
        listed = cls(mask.to(device), None if words is None else words.to(device), decided)
        if choose_impl(device.type)[0] != "triton":
            return listed
        return listed._replace(packed=pack(listed.mask.kv_indices, listed.mask.kv_counts, **listed._sizes()))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Call the kernel with the grid's own order of tokens."""
        grid, batch = self.mask.query_order.grid, q.shape[0]

        def per_sample(start: int) -> torch.Tensor:
            return torch.full((batch,), start, dtype=torch.int32, device=q.device)

        out = block_sparse_attention(
            q,
            k,
            v,
            self.mask.kv_indices,
            self.mask.kv_counts,
            **self._sizes(),
            packed=self.packed,
            visual_start=per_sample(grid.visual_start),
            conditioning_start=per_sample(grid.conditioning_start),
            text_start=per_sample(grid.text_start),
            text_len=None if asked.text_lens is None else asked.text_lens.to(device=q.device, dtype=torch.int32),
            text_bias=asked.text_bias,
            scale=asked.scale,
            impl=asked.impl,
        )
        return cast(torch.Tensor, out)

    def _sizes(self) -> dict[str, Any]:
        """What the kernel is told of the lists, as keyword arguments."""
        query_order, key_order = self.mask.query_order, self.mask.key_order
        return {
            "block_q": query_order.block,
            "block_k": key_order.block,
            "partial": None if self.tables is None else self.mask.partial,
            "tables": self.tables,
            "partial_blocks": self.decided,
            "grid": query_order.grid.shape,
            "tile_q": query_order.tile,
            "tile_k": key_order.tile,
            "conditioning": query_order.grid.conditioning,
            "text": query_order.grid.text,
        }
