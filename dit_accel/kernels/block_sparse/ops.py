"""The custom ops behind `api`: opaque to `torch.compile`, with fake kernels for tracing and the backward.

Their signatures are flat; all other code passes the records of `geometry`. An implementation's module is imported when
an op runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, Segments, empty_rows


@torch.library.custom_op("dit_accel::block_sparse_attention", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    partial: Tensor | None,
    tables: Tensor | None,
    packed: Tensor | None,
    visual_start: Tensor | None,
    conditioning_start: Tensor | None,
    text_start: Tensor | None,
    text_len: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D], laid out in memory as [B, Nq, H, D], and LSE [B, H, Nq]."""
    lists = BlockLists(indices, counts, partial, tables, packed)
    segments = Segments(visual_start, conditioning_start, text_start, text_len)
    return impls.named(impl).load().forward(q, k, v, lists, segments, Geometry.unpack(geometry), scale)


@attention_forward.register_fake
def _(q, k, v, *rest):
    return empty_rows(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    partial: Tensor | None,
    tables: Tensor | None,
    packed: Tensor | None,
    visual_start: Tensor | None,
    conditioning_start: Tensor | None,
    text_start: Tensor | None,
    text_len: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each laid out in memory as [B, N, H, D]."""
    lists = BlockLists(indices, counts, partial, tables, packed)
    segments = Segments(visual_start, conditioning_start, text_start, text_len)
    backward = impls.named(impl).load().backward
    return backward(grad_out, grad_lse, q, k, v, out, lse, lists, segments, Geometry.unpack(geometry), scale)


@attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return tuple(empty_rows(x) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *records, geometry, scale, impl = inputs
    ctx.save_for_backward(q, k, v, *output, *records)
    ctx.set_materialize_grads(False)
    ctx.geometry, ctx.scale, ctx.impl = geometry, scale, impl


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *records = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attention_backward(grad_out, grad_lse, q, k, v, out, lse, *records, ctx.geometry, ctx.scale, ctx.impl)
    return *grads, *(None,) * (len(records) + 3)


attention_forward.register_autograd(_backward, setup_context=_setup_context)
