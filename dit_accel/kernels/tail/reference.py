"""The definition of the tail: one softmax over the exact part and a pseudo-key for each other block. Its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry
from dit_accel.kernels.cuts import block_means
from dit_accel.order import valid_tokens


class TailInputs(NamedTuple):
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


class TailedInputs(NamedTuple):
    """Attention of the visual queries with the tail, for implementations that compute both in one kernel.

    exact: over listed blocks, conditioning and text; its queries are the visual tokens, in a grid of their own.
    dropped: as of `TailInputs`.
    share: whether the tail's share of every row's weights is wanted.
    """

    exact: BlockSparseInputs
    dropped: Tensor | None
    share: bool


def forward(call: TailInputs) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`; by plain autograd, in fp64 for fp64 inputs and in fp32 otherwise.

    The exact part is one more entry of a row: its logit is `exact_lse`, its value `exact`.
    """
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = block_means(k, geometry.key_order), block_means(v, geometry.key_order)
    held = valid_tokens(geometry.key_order, q.device).to(wide)
    rows = geometry.query_order.block_of_token().to(q.device)
    logits = (q.to(wide) @ keys.mT) * scale + held.log()
    logits = logits.masked_fill(~in_tail(lists, dropped, geometry.key_order.blocks)[:, :, rows], -torch.inf)
    logits = torch.cat([exact_lse[..., None].to(wide), logits], -1)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = weights[..., :1] * exact.to(wide) + weights[..., 1:] @ values
    return out.to(exact.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.to(exact_lse.dtype)


def in_tail(lists: BlockLists, dropped: Tensor | None, blocks: int) -> Tensor:
    """Whether each of `blocks` key blocks is in the tail of a query block: bool [..., query blocks, blocks]."""
    listed = lists.map(lists.used, blocks)
    return ~(listed if dropped is None else listed | dropped)
