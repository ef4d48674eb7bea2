"""The custom ops of the Triton implementation: opaque to `torch.compile`, shapes for tracing, backward.

Only torch is imported here; the kernels are imported when an op runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.sla.layout import Cut, Segments


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"dit_accel.kernels.sla.{name}")


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty [B, H, N, D] laid out in memory as [B, N, H, D]."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@torch.library.custom_op("dit_accel::sla_block_means", mutates_args=())
def block_means(x: torch.Tensor, cut: Sequence[int]) -> torch.Tensor:
    """Mean of every block's tokens, fp32, for `select`.

    Args:
        x: visual tokens in raster order, [B, H, visual, D], any strides.
        cut: `layout.Cut.pack`.

    Returns:
        [B, H, D, blocks]: a row for each dimension, so that neighbouring threads read neighbouring blocks.
    """
    return _kernels("triton").block_means(x, Cut.unpack(cut))


def _fake_means(x: torch.Tensor, cut: Sequence[int]) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], x.shape[-1], Cut.unpack(cut).blocks, dtype=torch.float32)


block_means.register_fake(_fake_means)


@torch.library.custom_op("dit_accel::sla_select", mutates_args=())
def select(
    query_means: torch.Tensor, key_means: torch.Tensor, critical: int, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best and the worst key blocks of every query block, by `block_means` of both; see `router.route_blocks`."""
    return _kernels("triton").select(query_means, key_means, critical, skipped)


@select.register_fake
def _(query_means, key_means, critical, skipped):
    rows = *query_means.shape[:2], query_means.shape[3]
    return tuple(query_means.new_empty((*rows, n), dtype=torch.int32) for n in (critical, skipped))


def route(
    q: torch.Tensor, k: torch.Tensor, cut: Sequence[int], critical: int, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.router.route_blocks`."""
    return select(block_means(q, cut), block_means(k, cut), critical, skipped)


@torch.library.custom_op("dit_accel::sla_state", mutates_args=())
def state(
    k: torch.Tensor, v: torch.Tensor, cut: Sequence[int], feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi(k)^T v [B, H, D, D] and the sum of phi(k) over the tokens [B, H, D], both fp32; and `block_means` of k.

    One pass over k serves the linear branch and the router. What comes of it carries no gradient: `attend` gives k and
    v all of theirs.
    """
    return _kernels("triton").state(k, v, Cut.unpack(cut), feature_map)


@state.register_fake
def _(k, v, cut, feature_map):
    batch, heads, _, dim = k.shape
    total = k.new_empty(batch, heads, dim, dtype=torch.float32)
    return k.new_empty(batch, heads, dim, dim, dtype=torch.float32), total, _fake_means(k, cut)


@torch.library.custom_op("dit_accel::sla_attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    total: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    text_len: torch.Tensor,
    cut: Sequence[int],
    segments: Sequence[int],
    scale: float,
    feature_map: str,
    linear_scope: str,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both branches of sparse-linear attention for the visual queries.

    Args:
        q: visual tokens, [B, H, visual, D].
        k, v: all tokens, [B, H, N, D].
        state, total: `state` of the visual keys. The gradients of k and v hold what flows through them too, so they get
            none of their own.
        critical, skipped: int32 [B, H, blocks, *], ascending. No critical blocks are allowed.
        weight, bias: fp32 [D, D] and [D].
        text_len: int32 [B].
        cut, segments: `layout.Cut.pack`, and the integers of `layout.Segments`.
        training: whether what the backward wants is kept.

    Returns:
        The output [B, H, visual, D], laid out in memory as [B, visual, H, D]. For training the exact branch, as the
        output, and its LSE fp32 [B, H, visual]; in scope "marginal" also the linear branch before its projection, its
        denominators with eps fp32 [B, H, visual], and int32 [B, H, blocks]: 1 for a query block whose marginal blocks
        were summed one by one (see `triton_marginal`). What is not wanted has no elements.
    """
    kernels = _kernels("triton")
    lists = kernels.Lists(critical.contiguous(), skipped.contiguous())
    call = kernels.Call(Cut.unpack(cut), Segments(*segments), scale, feature_map, linear_scope)
    return kernels.forward(q, k, v, (state, total), lists, weight, bias, text_len, call, training)


@attend.register_fake
def _(q, k, v, state, total, critical, skipped, weight, bias, text_len, cut, segments, scale, fmap, scope, training):
    none, marginal = q.new_empty(0), training and scope == "marginal"
    per_row = q.new_empty(q.shape[:3], dtype=torch.float32)
    return (
        _like(q),
        _like(q) if training else none,
        per_row if training else none.float(),
        _like(q) if marginal else none.clone(),
        per_row.clone() if marginal else none.float().clone(),
        critical.new_empty(critical.shape[:-1] if marginal else (0,)),
    )


@torch.library.custom_op("dit_accel::sla_attend_backward", mutates_args=())
def attend_backward(
    gradient: torch.Tensor,
    saved: Sequence[torch.Tensor],
    cut: Sequence[int],
    segments: Sequence[int],
    scale: float,
    feature_map: str,
    linear_scope: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, laid out in memory as [B, N, H, D], and d(weight) and d(bias) in fp32.

    Args:
        saved: the tensors that `attend` got, save the bias, and what it gave besides the output.
    """
    q, k, v, state, total, critical, skipped, weight, text_len, *outputs = saved
    kernels = _kernels("triton")
    lists = kernels.Lists(critical.contiguous(), skipped.contiguous())
    call = kernels.Call(Cut.unpack(cut), Segments(*segments), scale, feature_map, linear_scope)
    return kernels.backward(gradient, q, k, v, (state, total), lists, weight, text_len, outputs, call)


@attend_backward.register_fake
def _(gradient, saved, *rest):
    q, k, v, *_ = saved
    weight = saved[7]
    return _like(q), _like(k), _like(v), torch.empty_like(weight), weight.new_empty(weight.shape[:1])


def _save(ctx, inputs, output) -> None:
    *tensors, weight, bias, text_len, ctx.cut, ctx.segments, ctx.scale, ctx.feature_map, ctx.scope, training = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, weight, text_len, *output[1:])
    if not training:
        raise DitAccelError("sla_attend was called without training=True, but a gradient is wanted.")


def _differentiate(ctx, gradient, *_):
    dq, dk, dv, dweight, dbias = attend_backward(
        gradient, ctx.saved_tensors, ctx.cut, ctx.segments, ctx.scale, ctx.feature_map, ctx.scope
    )
    return dq, dk, dv, *[None] * 4, dweight, dbias if ctx.has_bias else None, *[None] * 7


attend.register_autograd(_differentiate, setup_context=_save)
