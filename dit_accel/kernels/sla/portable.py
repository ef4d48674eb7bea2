"""The linear branch in plain PyTorch, and calls made of it, the router and the block-sparse engine.

README.md in this folder has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists, Geometry, empty_rows
from dit_accel.kernels.cuts import from_blocks, to_blocks, visual_of
from dit_accel.kernels.gradients import register_gradients
from dit_accel.kernels.router.api import classify
from dit_accel.kernels.sla.arguments import EPSILON, FeatureMap, SlaArguments, apply_map, learned_inputs, pull_back
from dit_accel.order import TokenOrder

# Bytes of block states held at once.
_STATE_BYTES = 1 << 26


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SlaArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`; returns the output and the critical blocks."""
    orders, weight = (call.query_order, call.key_order), call.weight
    queries, keys, values = (visual_of(x, call.grid) for x in (q, k, v))
    critical, negligible = call.lists or classify(q, k, *orders, call.topk, call.skip, call.impl)
    if call.topk or call.key_order.dense_blocks:
        exact, _ = attend_visual(
            q, k, v, BlockLists.full(critical), *orders,
            text_lens=call.text_len, text_bias=call.text_bias, scale=call.scale, impl="portable",
        )  # fmt: skip
    else:
        exact = empty_rows(queries).zero_()
    queries, keys = learned_inputs(queries, keys, call.features)
    if call.linear_scope == "all":
        projected = linear_all(queries, keys, values, call.feature_map, weight)
    else:
        geometry = Geometry.of_visual(*orders).pack()
        linear, _ = linear_marginal(queries, keys, values, critical, negligible, geometry, call.feature_map)
        projected = F.linear(linear, weight.to(linear.dtype))
    if call.bias is not None:
        projected = projected + call.bias
    # The sum has the memory layout of its first term, [B, N, H, D], so that the model's flatten copies nothing.
    return exact + projected.to(q.dtype), critical


def linear_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: FeatureMap, weight: torch.Tensor
) -> torch.Tensor:
    """Linear attention over all keys, fp32 or fp64 [B, H, N, D], projected by `weight`, which turns the D x D state."""
    wide = torch.promote_types(q.dtype, torch.float32)
    a, b = apply_map(q.to(wide), feature_map), apply_map(k.to(wide), feature_map)
    state, total = (b.mT @ v.to(wide)) @ weight.to(wide).mT, b.sum(-2).unsqueeze(-1)
    return (a @ state) / (a @ total + EPSILON)


@torch.library.custom_op("dit_accel::sla_linear_marginal", mutates_args=())
def linear_marginal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    negligible: torch.Tensor,
    geometry: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of every query block over its marginal key blocks.

    The states phi(k)^T v of the marginal blocks are summed directly, by a product with a 0/1 matrix of blocks. Nothing
    is subtracted, so nothing cancels. The sum of phi(k) is one more column of v. States exist for a few heads and
    columns of v at a time, and the backward recomputes them.

    Args:
        q, k, v: visual tokens in raster order, [B, H, visual, D], any strides.
        critical, negligible: the router's lists, int32 [B, H, query blocks, *].
        geometry: of the visual tokens alone, as `Geometry.pack` returns it.

    Returns:
        The output [B, H, visual, D], 0 for a row without marginal blocks. Its denominators with eps
        [B, H, visual, 1], which carry no gradient. Both are fp32 (fp64 for fp64 input).
    """
    query_order, key_order = Geometry.unpack(geometry).orders
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(v.shape, dtype=wide, device=v.device)
    denominator = torch.empty((*v.shape[:-1], 1), dtype=wide, device=v.device)
    for at in _head_groups(v, query_order, key_order):
        a = to_blocks(apply_map(q[at].to(wide), feature_map), query_order)
        b = to_blocks(apply_map(k[at].to(wide), feature_map), key_order)
        values = to_blocks(_with_ones(v[at].to(wide)), key_order)
        mixing = _marginal_blocks(critical[at], negligible[at], key_order, wide)
        columns = values.split(_columns_at_once(b, mixing), dim=-1)
        numerator = from_blocks(torch.cat([a @ _mix(mixing, b.mT @ part) for part in columns], dim=-1), query_order)
        denominator[at] = numerator[..., -1:] + EPSILON
        out[at] = numerator[..., :-1] / denominator[at]
    return out, denominator


@linear_marginal.register_fake
def _(q, k, v, critical, negligible, geometry, feature_map):
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape, dtype=wide), v.new_empty((*v.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("dit_accel::sla_linear_marginal_backward", mutates_args=())
def linear_marginal_backward(
    gradient: torch.Tensor,
    grad_denominator: torch.Tensor | None,
    out: torch.Tensor,
    denominator: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    geometry: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `linear_marginal`, with the dtypes and shapes of q, k and v.

    `tensors` are those of `linear_marginal`. Its denominators carry no gradient, so `grad_denominator` is not read.
    """
    q, k, v, critical, negligible = tensors
    query_order, key_order = Geometry.unpack(geometry).orders
    wide = out.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for at in _head_groups(v, query_order, key_order):
        query, key = q[at].to(wide), k[at].to(wide)
        phi_q, phi_k = apply_map(query, feature_map), apply_map(key, feature_map)
        a, b = to_blocks(phi_q, query_order), to_blocks(phi_k, key_order)
        values = to_blocks(_with_ones(v[at].to(wide)), key_order)
        scaled = gradient[at].to(wide) / denominator[at]
        # gradient of the quotient: g / d for the columns of v, -(g . o) / d for the column of ones
        of_numerator = torch.cat([scaled, -(scaled * out[at]).sum(-1, keepdim=True)], dim=-1)
        of_numerator = to_blocks(of_numerator, query_order)
        mixing = _marginal_blocks(critical[at], negligible[at], key_order, wide)
        da, db, dvalues = torch.zeros_like(a), torch.zeros_like(b), []
        step = _columns_at_once(b, mixing)
        for columns, of_columns in zip(values.split(step, dim=-1), of_numerator.split(step, dim=-1), strict=True):
            da += of_columns @ _mix(mixing, b.mT @ columns).mT
            of_state = _mix(mixing.mT, a.mT @ of_columns)
            db += columns @ of_state.mT
            dvalues.append(b @ of_state)
        dq[at] = pull_back(from_blocks(da, query_order), query, phi_q, feature_map).to(q.dtype)
        dk[at] = pull_back(from_blocks(db, key_order), key, phi_k, feature_map).to(k.dtype)
        dv[at] = from_blocks(torch.cat(dvalues, dim=-1), key_order)[..., :-1].to(v.dtype)
    return dq, dk, dv


@linear_marginal_backward.register_fake
def _(gradient, grad_denominator, out, denominator, tensors, *rest):
    return tuple(x.new_empty(x.shape) for x in tensors[:3])


register_gradients(linear_marginal, linear_marginal_backward)


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    return torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)


def _marginal_blocks(
    critical: torch.Tensor, negligible: torch.Tensor, key_order: TokenOrder, dtype: torch.dtype
) -> torch.Tensor:
    """1 where a key block is marginal, 0 elsewhere: [heads, query blocks, key blocks]."""
    mixing = torch.ones((*critical.shape[:2], key_order.visual_blocks), dtype=dtype, device=critical.device)
    return mixing.scatter_(-1, torch.cat([critical, negligible], dim=-1).long(), 0)


def _mix(mixing: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sums of the states [heads, blocks, D, E] over the marginal blocks of each row."""
    return (mixing @ states.flatten(2)).unflatten(2, states.shape[2:])


def _head_groups(v: torch.Tensor, query_order: TokenOrder, key_order: TokenOrder) -> Iterator[tuple[int, slice]]:
    """(sample, heads) whose states fit the memory limit, at least one head at a time."""
    states = query_order.visual_blocks + key_order.visual_blocks
    step = max(1, _STATE_BYTES // (states * v.shape[-1] * (v.shape[-1] + 1) * 4))
    for sample in range(v.shape[0]):
        for first in range(0, v.shape[1], step):
            yield sample, slice(first, first + step)


def _columns_at_once(features: torch.Tensor, mixing: torch.Tensor) -> int:
    """How many columns of v have states that fit the memory limit, at least one; features [heads, blocks, block, D]."""
    heads, queries, keys = mixing.shape
    return max(1, _STATE_BYTES // (heads * (queries + keys) * features.shape[-1] * 4))
