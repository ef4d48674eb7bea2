"""Custom ops of attention with the tail in one kernel, and the gradients of one softmax over both parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import merge
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Segments, empty_rows
from dit_accel.kernels.gradients import register_gradients
from dit_accel.kernels.tail.reference import TailedInputs, TailInputs, in_tail


@torch.library.custom_op("dit_accel::attention_with_tail", mutates_args=())
def attention_with_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    dropped: Tensor | None,
    text_len: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    share: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the visual queries over listed blocks and the tail, by an implementation of attention.

    Args:
        q: visual queries [B, H, visual, D]; k, v: the whole sequence, [B, H, N, D].
        indices, counts: listed key blocks, conditioning and text blocks too, int32 [B, H, query blocks, width].
        dropped: as in `api.attend_with_tail`.
        text_len: int32 [B], valid text keys.
        geometry: of whole blocks; the visual queries have a grid of their own.
        share: the last result is wanted.

    Returns:
        Output [B, H, visual, D], in memory [B, visual, H, D]. LSE [B, H, visual]. The tail's share of every row's
        weights, [B, H, visual], or [0].
    """
    call = _call((q, k, v, indices, counts, dropped, text_len), geometry, scale, share)
    row = impls.named(impl)
    return row.load_tail().forward(call, row.cuts)


@attention_with_tail.register_fake
def _(q, k, v, indices, counts, dropped, text_len, geometry, scale, share, impl):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_rows(q), lse, lse.new_empty(q.shape[:3] if share else 0)


@torch.library.custom_op("dit_accel::attention_with_tail_backward", mutates_args=())
def attention_with_tail_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_share: Tensor | None,
    out: Tensor,
    lse: Tensor,
    part: Tensor,
    tensors: Sequence[Tensor | None],
    geometry: Sequence[int],
    scale: float,
    share: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, H, visual, D], k and v [B, H, N, D], each laid out in memory as [B, N, H, D].

    `part` and `tensors` are the last result and the tensors of `attention_with_tail`. The engine's kernels have the
    listed keys' part: they read the LSE and the output of the whole softmax. Each part has a gradient of the LSE of
    its own if the share has one (README.md).
    """
    row, call = impls.named(impl), _call(tensors, geometry, scale, share)
    of_listed = of_tail = grad_lse
    if share and grad_share is not None:
        of_listed, of_tail = (
            change if grad_lse is None else grad_lse + change
            for change in (-grad_share * part, grad_share * (1 - part))
        )
    tail = row.load_tail()
    parts = tail.parts_of(call, row.cuts)
    gradients = row.load_gradients().backward(grad_out, of_listed, out, lse, parts.listed)
    tail.add_gradients(gradients, grad_out, of_tail, out, lse, parts)
    return gradients


@attention_with_tail_backward.register_fake
def _(grad_out, grad_lse, grad_share, out, lse, part, tensors, *rest):
    return tuple(empty_rows(x) for x in tensors[:3])


def _call(tensors: Sequence[Tensor | None], geometry: Sequence[int], scale: float, share: bool) -> TailedInputs:
    q, k, v, indices, counts, dropped, text_len = tensors
    lists = BlockLists(indices, counts)  # type: ignore[arg-type]
    segments = Segments(text_len=text_len)
    exact = BlockSparseInputs(q, k, v, lists, segments, Geometry.unpack(geometry), scale)  # type: ignore[arg-type]
    return TailedInputs(exact, dropped, share)


register_gradients(attention_with_tail, attention_with_tail_backward)


def forward(call: TailInputs) -> tuple[Tensor, Tensor]:
    """`api.with_tail` beside attention that does not take the tail: the same kernel with empty lists, merged by LSE.

    PyTorch differentiates it.
    """
    q, k, v, exact, exact_lse, lists, dropped, geometry, scale = call
    outside = ~in_tail(lists, dropped, geometry.key_order.blocks)
    indices = lists.indices.new_zeros(*lists.counts.shape, 1)
    nothing = indices, lists.counts.new_zeros(lists.counts.shape)
    out, lse, _ = attention_with_tail(q, k, v, *nothing, outside, None, geometry.pack(), scale, False, "triton")
    return merge(exact, exact_lse, out, lse)
