"""The custom ops behind `api`: opaque to `torch.compile`, with fake kernels for tracing and the backward.

Their signatures are flat; all other code passes the record of `call`. An implementation's module is imported when
an op runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.call import BlockSparseCall
from dit_accel.kernels.block_sparse.geometry import empty_rows


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
    records = indices, counts, partial, tables, packed, visual_start, conditioning_start, text_start, text_len
    return impls.named(impl).load().forward(BlockSparseCall.unpack((q, k, v, *records, geometry, scale)))


@attention_forward.register_fake
def _(q, k, v, *rest):
    return empty_rows(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each laid out in memory as [B, N, H, D]."""
    records = indices, counts, partial, tables, packed, visual_start, conditioning_start, text_start, text_len
    call = BlockSparseCall.unpack((q, k, v, *records, geometry, scale))
    return impls.named(impl).load().backward(grad_out, grad_lse, out, lse, call)


@attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, *rest):
    return tuple(empty_rows(x) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.geometry, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None:
        grad_out = torch.zeros_like(ctx.saved_tensors[0])
    grads = attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.geometry, ctx.scale, ctx.impl)
    return *grads, *[None] * (len(ctx.saved_tensors) - 2)


attention_forward.register_autograd(_backward, setup_context=_setup_context)
