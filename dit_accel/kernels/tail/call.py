"""The record of a tail's call, which every implementation takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry


class TailCall(NamedTuple):
    """Visual tokens, and the part of their attention that is exact.

    q, k, v: [B, H, visual, D] in model order, any strides.
    exact, exact_lse: attention over listed blocks, conditioning and text, [B, H, visual, D], and its LSE.
    lists: the visual key blocks that `exact` attended, int32 [B, H, query blocks, width].
    dropped: bool [B, H, query blocks, key blocks], blocks that are neither listed nor in the tail; None: no block.
    geometry: of the visual tokens alone.
    scale: factor of the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor
    exact_lse: Tensor
    lists: BlockLists
    dropped: Tensor | None
    geometry: Geometry
    scale: float
