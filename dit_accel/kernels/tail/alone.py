"""The tail on a GPU beside attention that does not take it in: its kernel with empty lists, merged by LSE."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.block_sparse.api import merge
from dit_accel.kernels.tail.ops import attention_with_tail
from dit_accel.kernels.tail.reference import TailInputs, in_tail


def forward(call: TailInputs) -> tuple[Tensor, Tensor]:
    """See `api.with_tail`; PyTorch differentiates it."""
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    outside = ~in_tail(lists, dropped, geometry.key_order.blocks)
    indices = lists.indices.new_zeros(*lists.counts.shape, 1)
    nothing = indices, lists.counts.new_zeros(lists.counts.shape)
    out, lse, _ = attention_with_tail(q, k, v, *nothing, outside, None, geometry.pack(), scale, False, "triton")
    return merge(exact, exact_lse, out, lse)
