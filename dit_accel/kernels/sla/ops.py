"""The custom ops of the Triton implementation: opaque to `torch.compile`, shapes for tracing, backward.

Only torch is imported here; the kernels are imported when an op runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from dit_accel.kernels.sla.layout import count_blocks


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"dit_accel.kernels.sla.{name}")


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty [B, H, N, D] laid out in memory as [B, N, H, D]."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@torch.library.custom_op("dit_accel::sla_route_triton", mutates_args=())
def route(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    critical: int,
    skipped: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.router.route_blocks`."""
    return _kernels("triton").route(q, k, grid, block, tile, critical, skipped)


@route.register_fake
def _(q, k, grid, block, tile, critical, skipped):
    rows = *q.shape[:2], count_blocks(grid, block, tile)
    return tuple(q.new_empty((*rows, n), dtype=torch.int32) for n in (critical, skipped))


@torch.library.custom_op("dit_accel::sla_state", mutates_args=())
def state(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(k)^T v [B, H, D, D] and the sum of phi(k) over the tokens [B, H, D], both fp32."""
    return _kernels("triton").state(k, v, feature_map)


@state.register_fake
def _(k, v, feature_map):
    batch, heads, _, dim = k.shape
    return k.new_empty(batch, heads, dim, dim, dtype=torch.float32), k.new_empty(batch, heads, dim, dtype=torch.float32)


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
    k, v, ctx.feature_map = inputs
    ctx.save_for_backward(k, v)


def _differentiate_state(ctx, dstate, dtotal):
    return *state_backward(*ctx.saved_tensors, dstate, dtotal, ctx.feature_map), None


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
    critical: torch.Tensor,
    skipped: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dit_accel.kernels.sla.linear.linear_marginal`, the output in the dtype of q, the denominators in fp32.

    Also returns int32 [B, H, blocks]: 1 for a query block that was summed one by one (see `triton_marginal`).
    """
    return _kernels("triton").marginal(q, k, v, critical, skipped, grid, block, tile, feature_map)


@marginal.register_fake
def _(q, k, v, critical, skipped, grid, block, tile, feature_map):
    modes = critical.new_empty(critical.shape[:-1])
    return _like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32), modes


@torch.library.custom_op("dit_accel::sla_marginal_triton_backward", mutates_args=())
def marginal_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    denominators: torch.Tensor,
    modes: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `marginal`, laid out in memory as [B, N, H, D]."""
    return _kernels("triton").marginal_backward(
        gradient, q, k, v, critical, skipped, denominators, modes, grid, block, tile, feature_map
    )


@marginal_backward.register_fake
def _(gradient, q, k, v, *rest):
    return _like(q), _like(k), _like(v)


def _save_marginal(ctx, inputs, output) -> None:
    q, k, v, critical, skipped, *ctx.setting = inputs
    _, denominators, modes = output
    ctx.mark_non_differentiable(denominators, modes)
    ctx.save_for_backward(q, k, v, critical, skipped, denominators, modes)


def _differentiate_marginal(ctx, gradient, *_):
    gradients = marginal_backward(gradient, *ctx.saved_tensors, *ctx.setting)
    return *gradients, None, None, None, None, None, None


marginal.register_autograd(_differentiate_marginal, setup_context=_save_marginal)
