"""The custom ops of the Triton implementation: opaque to `torch.compile`, shapes for tracing, backward.

Only torch is imported here; the kernels are imported when an op runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from dit_accel.kernels.sla.layout import Cut


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

    One pass over k serves the linear branch and the router. The means carry no gradient.
    """
    return _kernels("triton").state(k, v, Cut.unpack(cut), feature_map)


@state.register_fake
def _(k, v, cut, feature_map):
    batch, heads, _, dim = k.shape
    total = k.new_empty(batch, heads, dim, dtype=torch.float32)
    return k.new_empty(batch, heads, dim, dim, dtype=torch.float32), total, _fake_means(k, cut)


@torch.library.custom_op("dit_accel::sla_state_backward", mutates_args=())
def state_backward(
    k: torch.Tensor, v: torch.Tensor, dstate: torch.Tensor, dtotal: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv, laid out in memory as [B, N, H, D]."""
    return _kernels("triton").state_backward(k, v, dstate, dtotal, feature_map)


@state_backward.register_fake
def _(k, v, dstate, dtotal, feature_map):
    return _like(k), _like(v)


def _save_state(ctx, inputs, output) -> None:
    k, v, _, ctx.feature_map = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(k, v)


def _differentiate_state(ctx, dstate, dtotal, _):
    return *state_backward(*ctx.saved_tensors, dstate, dtotal, ctx.feature_map), None, None


state.register_autograd(_differentiate_state, setup_context=_save_state)


@torch.library.custom_op("dit_accel::sla_apply", mutates_args=())
def apply(
    q: torch.Tensor,
    exact: torch.Tensor,
    table: torch.Tensor,
    total: torch.Tensor,
    bias: torch.Tensor | None,
    feature_map: str,
) -> torch.Tensor:
    """exact + phi(q) table / (phi(q) . total + eps) + bias.

    Args:
        q, exact: [B, H, N, D].
        table: fp32 [B, H, D, D], the projected state.
        total: fp32 [B, H, D].
        bias: fp32 [D].

    Returns:
        [B, H, N, D] in the dtype of q, laid out in memory as [B, N, H, D].
    """
    return _kernels("triton").apply(q, exact, table, total, bias, feature_map)


@apply.register_fake
def _(q, exact, table, total, bias, feature_map):
    return _like(q)


@torch.library.custom_op("dit_accel::sla_apply_backward", mutates_args=())
def apply_backward(
    gradient: torch.Tensor, q: torch.Tensor, table: torch.Tensor, total: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq as q, laid out in memory as [B, N, H, D]; d(table), d(total) and d(bias) in fp32."""
    return _kernels("triton").apply_backward(gradient, q, table, total, feature_map)


@apply_backward.register_fake
def _(gradient, q, table, total, feature_map):
    return _like(q), torch.empty_like(table), torch.empty_like(total), total.new_empty(total.shape[-1])


def _save_apply(ctx, inputs, output) -> None:
    q, _, table, total, bias, ctx.feature_map = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(q, table, total)


def _differentiate_apply(ctx, gradient):
    dq, dtable, dtotal, dbias = apply_backward(gradient, *ctx.saved_tensors, ctx.feature_map)
    return dq, gradient, dtable, dtotal, dbias if ctx.has_bias else None, None


apply.register_autograd(_differentiate_apply, setup_context=_save_apply)


@torch.library.custom_op("dit_accel::sla_marginal_triton", mutates_args=())
def marginal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    whole_state: torch.Tensor,
    whole_total: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    cut: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dit_accel.kernels.sla.linear.linear_marginal`, the output in the dtype of q, the denominators in fp32.

    `whole_state` and `whole_total` are `state` of k and v. The gradients of k and v hold what flows through them too,
    so they get none of their own: pass them detached. Both are small and kept for the backward.

    Also returns int32 [B, H, blocks]: 1 for a query block that was summed one by one (see `triton_marginal`).
    """
    kernels = _kernels("triton")
    lists = kernels.Lists(critical.contiguous(), skipped.contiguous())
    return kernels.marginal(q, k, v, (whole_state, whole_total), lists, Cut.unpack(cut), feature_map)


@marginal.register_fake
def _(q, k, v, whole_state, whole_total, critical, *rest):
    modes = critical.new_empty(critical.shape[:-1])
    return _like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32), modes


@torch.library.custom_op("dit_accel::sla_marginal_triton_backward", mutates_args=())
def marginal_backward(
    gradient: torch.Tensor, saved: Sequence[torch.Tensor], cut: Sequence[int], feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `marginal`, laid out in memory as [B, N, H, D]; `saved`: its tensors, then its last outputs."""
    q, k, v, whole_state, whole_total, critical, skipped, denominators, modes = saved
    kernels = _kernels("triton")
    lists = kernels.Lists(critical.contiguous(), skipped.contiguous())
    return kernels.marginal_backward(
        gradient, q, k, v, (whole_state, whole_total), lists, denominators, modes, Cut.unpack(cut), feature_map
    )


@marginal_backward.register_fake
def _(gradient, saved, cut, feature_map):
    q, k, v, *_ = saved
    return _like(q), _like(k), _like(v)


def _save_marginal(ctx, inputs, output) -> None:
    *tensors, ctx.cut, ctx.feature_map = inputs
    _, denominators, modes = output
    ctx.mark_non_differentiable(denominators, modes)
    ctx.save_for_backward(*tensors, denominators, modes)


def _differentiate_marginal(ctx, gradient, *_):
    return *marginal_backward(gradient, ctx.saved_tensors, ctx.cut, ctx.feature_map), *[None] * 6


marginal.register_autograd(_differentiate_marginal, setup_context=_save_marginal)
