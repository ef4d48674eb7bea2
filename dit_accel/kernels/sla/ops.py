"""Calls of the Triton implementation and its custom ops, which are opaque to `torch.compile`.

Only torch is imported here; an op imports the kernels when it runs.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, empty_rows
from dit_accel.kernels.block_sparse.triton_configs import LARGEST_BLOCK
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.router.api import classify, single_blocks
from dit_accel.kernels.sla.arguments import SlaArguments, results
from dit_accel.kernels.sla.triton_configs import MARGINAL_BLOCK


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SlaArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`; returns the output and the critical blocks.

    The pass over k that sums the state of the linear branch also makes the block means for the router. One kernel then
    computes both branches of the visual queries.
    """
    queries, keys, values = (visual_of(x, call.grid) for x in (q, k, v))
    sizes = Geometry.of_visual(call.query_order, call.key_order).pack(), call.key_order.visual_blocks
    keys_state, total, key_means = state(keys.detach(), values.detach(), *sizes, call.feature_map)
    orders = call.query_order, single_blocks(key_means)
    routed, negligible = call.lists or classify(q, key_means, *orders, call.topk, call.skip, call.impl)
    whole, critical = (keys_state, total), routed
    most = MARGINAL_BLOCK if call.linear_scope == "marginal" else LARGEST_BLOCK
    if call.query_order.block > most:
        cut, parents = call.query_order.cut(most, q.device)  # the parts of a block keep its lists
        critical, negligible = (x[:, :, parents[: cut.visual_blocks]] for x in (critical, negligible))
        call = call._replace(query_order=cut)
    geometry = dataclasses.replace(Geometry.of(call.query_order, call.key_order), own_queries=True)
    if call.text_bias is None:
        return _both_branches(queries, k, v, whole, critical, negligible, call, geometry), routed
    # Text with a bias joins the exact branch by its log-sum-exp, so the engine computes that branch. The fused kernel
    # computes the linear branch alone: nothing is critical, and critical blocks count as negligible.
    rest = torch.cat([critical, negligible], dim=-1) if call.linear_scope == "marginal" else negligible
    exact, _ = attend_visual(
        q, k, v, BlockLists.full(critical), call.query_order, call.key_order,
        text_lens=call.text_len, text_bias=call.text_bias, scale=call.scale, impl=call.impl,
    )  # fmt: skip
    alone = call._replace(impl="triton"), dataclasses.replace(geometry, conditioning=0, text=0)
    linear = _both_branches(queries, keys, values, whole, critical[..., :0], rest.sort(-1)[0], *alone)
    return exact + linear, routed


def _both_branches(
    queries: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, torch.Tensor],
    critical: torch.Tensor,
    negligible: torch.Tensor,
    call: SlaArguments,
    geometry: Geometry,
) -> torch.Tensor:
    """The fused kernel's output for visual queries. `whole`: state and total of the keys."""
    weight, bias, text_len = call.weight, call.bias, call.text_len
    if text_len is None or not geometry.text:
        text_len = torch.full(queries.shape[:1], geometry.text, dtype=torch.int32, device=queries.device)
    differentiable = (queries, k, v, weight, *([] if bias is None else [bias]))
    training = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    out, *_ = attend(
        queries, k, v, *whole, critical, negligible, weight.float(), None if bias is None else bias.float(), text_len,
        geometry.pack(), call.scale, call.feature_map, call.linear_scope, training, call.impl,
    )  # fmt: skip
    return out


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@torch.library.custom_op("dit_accel::sla_state", mutates_args=())
def state(
    k: torch.Tensor, v: torch.Tensor, geometry: Sequence[int], blocks: int, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi(k)^T v [B, H, D, D], the sum of phi(k) [B, H, D] and block means of k [B, H, blocks, D], all fp32.

    One pass over k serves the linear branch and the router. The results carry no gradient: `attend` returns the whole
    gradients of k and v.
    """
    return _kernels("triton").state(k, v, Geometry.unpack(geometry).key_order, feature_map)


@state.register_fake
def _(k, v, geometry, blocks, feature_map):
    batch, heads, _, dim = k.shape
    total = k.new_empty(batch, heads, dim, dtype=torch.float32)
    means = k.new_empty(batch, heads, blocks, dim, dtype=torch.float32)
    return k.new_empty(batch, heads, dim, dim, dtype=torch.float32), total, means


@torch.library.custom_op("dit_accel::sla_attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    total: torch.Tensor,
    critical: torch.Tensor,
    negligible: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    text_len: torch.Tensor,
    geometry: Sequence[int],
    scale: float,
    feature_map: str,
    linear_scope: str,
    training: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both branches of sparse-linear attention for the visual queries.

    Args:
        q: visual tokens, [B, H, visual, D].
        k, v: all tokens, [B, H, N, D].
        state, total: `state` of the visual keys. They get no gradient of their own: the gradients of k and v include
            it.
        critical, negligible: int32 [B, H, query blocks, *], ascending. There may be no critical blocks.
        weight, bias: fp32 [D, D] and [D].
        text_len: int32 [B].
        geometry: as `Geometry.pack` returns it; queries are visual tokens alone.
        training: whether to return what the backward reads.
        impl: the module whose `forward` runs, "triton" or "gluon".

    Returns:
        The output [B, H, visual, D], laid out in memory as [B, visual, H, D]. For training also the exact branch, like
        the output, and its LSE fp32 [B, H, visual]. In scope "marginal" also the linear branch before its projection
        and its denominators with eps, fp32 [B, H, visual]. The last one, int32 [B, H, query blocks], is 1 for a block
        that summed its marginal blocks one by one. Tensors that are not needed have no elements.
    """
    tensors = state, total, critical, negligible, weight, text_len
    call = _fused_call(geometry, scale, feature_map, linear_scope, *tensors)
    return _kernels(impl).forward(q, k, v, bias, call, training)


def _fused_call(geometry: Sequence[int], *arguments: Any) -> Any:
    """The record of the custom ops' arguments, a `triton.FusedArguments`."""
    call = _kernels("triton").FusedArguments(Geometry.unpack(geometry), *arguments)
    return call._replace(critical=call.critical.contiguous(), negligible=call.negligible.contiguous())


@attend.register_fake
def _(q, k, v, state, total, critical, *rest):
    *_, scope, training, _ = rest
    return results(q, critical, scope, training)


@torch.library.custom_op("dit_accel::sla_attend_backward", mutates_args=())
def attend_backward(
    gradient: torch.Tensor,
    saved: Sequence[torch.Tensor],
    geometry: Sequence[int],
    scale: float,
    feature_map: str,
    linear_scope: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, laid out in memory as [B, N, H, D], and d(weight) and d(bias) in fp32.

    Args:
        saved: the tensors that `attend` took, without the bias, and what it returned besides the output.
    """
    (q, k, v), tensors, outputs = saved[:3], saved[3:9], saved[9:]
    call = _fused_call(geometry, scale, feature_map, linear_scope, *tensors)
    return _kernels("triton").backward(gradient, q, k, v, outputs, call)


@attend_backward.register_fake
def _(gradient, saved, *rest):
    q, k, v, *_ = saved
    weight = saved[7]
    return empty_rows(q), empty_rows(k), empty_rows(v), torch.empty_like(weight), weight.new_empty(weight.shape[:1])


def _save(ctx, inputs, output) -> None:
    *tensors, weight, bias, text_len = inputs[:10]
    *ctx.settings, training, _ = inputs[10:]
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, weight, text_len, *output[1:])
    if not training:
        raise DitAccelError("sla_attend was called without training=True, but a gradient is needed.")


def _differentiate(ctx, gradient, *_):
    dq, dk, dv, dweight, dbias = attend_backward(gradient, ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, *[None] * 4, dweight, dbias if ctx.has_bias else None, *[None] * 7


attend.register_autograd(_differentiate, setup_context=_save)
