"""The linear branch over the blocks that are neither critical nor skipped, without an N x N or a saved D x D per block.

For one head, with a = phi(q), b = phi(k) and the marginal key blocks M(i) of query block i:

    o[i] = a[i] H[i] / (a[i] . z[i] + eps)     H[i] = sum over j in M(i) of b[j]^T v[j]     z[i] = sum of b[j]

(SLA, arXiv 2509.24006, section 3). The states b[j]^T v[j] are summed straight over M(i), as a product with a 0/1
matrix of blocks, so nothing is subtracted and nothing cancels. z rides along as one more column of v. States live for
a few heads and value columns at a time and are computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dit_accel.kernels.sla.features import EPSILON, FeatureMap, apply_map, pull_back
from dit_accel.kernels.sla.layout import Cut, from_blocks, to_blocks
from dit_accel.order import TokenOrder

# Bytes that the block states of one step may take.
_STATE_BYTES = 1 << 26


def linear_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: FeatureMap, weight: torch.Tensor
) -> torch.Tensor:
    """Linear attention over all keys, projected: fp32 (or fp64) [B, H, N, D] of [B, H, N, D].

    The projection `weight` [D, D] is applied to the D x D state, not to N rows.
    """
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
    skipped: torch.Tensor,
    cut: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of every query block over its marginal key blocks.

    Args:
        q, k, v: visual tokens in raster order, [B, H, visual, D], any strides.
        critical, skipped: int32 [B, H, blocks, *]; what the router kept and dropped.
        cut: as for `dit_accel.kernels.sla.router.route_blocks`.
        feature_map: see `dit_accel.kernels.sla.features.apply_map`.

    Returns:
        The output [B, H, visual, D], 0 for a row without marginal blocks, and its denominators with eps
        [B, H, visual, 1], both fp32 (fp64 for fp64 input). The denominators carry no gradient.
    """
    order = Cut.unpack(cut).order
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(v.shape, dtype=wide, device=v.device)
    denominator = torch.empty((*v.shape[:-1], 1), dtype=wide, device=v.device)
    for at in _head_groups(q, v, order):
        a, b = (to_blocks(apply_map(x[at].to(wide), feature_map), order) for x in (q, k))
        values = to_blocks(_with_ones(v[at].to(wide)), order)
        mixing = _marginal_blocks(critical[at], skipped[at], wide)
        parts = [a @ _mix(mixing, b.mT @ columns) for columns in _column_groups(values, order)]
        numerator = from_blocks(torch.cat(parts, dim=-1), order)
        denominator[at] = numerator[..., -1:] + EPSILON
        out[at] = numerator[..., :-1] / denominator[at]
    return out, denominator


@linear_marginal.register_fake
def _(q, k, v, critical, skipped, cut, feature_map):
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape, dtype=wide), v.new_empty((*v.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("dit_accel::sla_linear_marginal_backward", mutates_args=())
def linear_marginal_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    cut: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `linear_marginal`, in the dtypes and shapes of q, k and v."""
    order = Cut.unpack(cut).order
    wide = out.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for at in _head_groups(q, v, order):
        query, key = q[at].to(wide), k[at].to(wide)
        phi_q, phi_k = apply_map(query, feature_map), apply_map(key, feature_map)
        a, b = to_blocks(phi_q, order), to_blocks(phi_k, order)
        values = to_blocks(_with_ones(v[at].to(wide)), order)
        scaled = gradient[at].to(wide) / denominator[at]
        # Through the quotient: the columns of v get g / d, the column of ones -(g . o) / d.
        of_numerator = torch.cat([scaled, -(scaled * out[at]).sum(-1, keepdim=True)], dim=-1)
        of_numerator = to_blocks(of_numerator, order)
        mixing = _marginal_blocks(critical[at], skipped[at], wide)
        da, db, dvalues = torch.zeros_like(a), torch.zeros_like(b), []
        groups = zip(_column_groups(values, order), _column_groups(of_numerator, order), strict=True)
        for columns, of_columns in groups:
            da += of_columns @ _mix(mixing, b.mT @ columns).mT
            of_state = _mix(mixing.mT, a.mT @ of_columns)
            db += columns @ of_state.mT
            dvalues.append(b @ of_state)
        dq[at] = pull_back(from_blocks(da, order), query, phi_q, feature_map).to(q.dtype)
        dk[at] = pull_back(from_blocks(db, order), key, phi_k, feature_map).to(k.dtype)
        dv[at] = from_blocks(torch.cat(dvalues, dim=-1), order)[..., :-1].to(v.dtype)
    return dq, dk, dv


@linear_marginal_backward.register_fake
def _(gradient, q, k, v, critical, skipped, out, denominator, cut, feature_map):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, critical, skipped, *ctx.setting = inputs
    out, denominator = output
    ctx.save_for_backward(q, k, v, critical, skipped, out, denominator)


def _differentiate(ctx, gradient, _):
    gradients = linear_marginal_backward(gradient, *ctx.saved_tensors, *ctx.setting)
    return *gradients, None, None, None, None


linear_marginal.register_autograd(_differentiate, setup_context=_save)


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    return torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)


def _marginal_blocks(critical: torch.Tensor, skipped: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where a key block is neither critical nor skipped: [heads, blocks, blocks]."""
    mixing = torch.ones((*critical.shape[:2], critical.shape[1]), dtype=dtype, device=critical.device)
    return mixing.scatter_(-1, torch.cat([critical, skipped], dim=-1).long(), 0)


def _mix(mixing: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sum the states [heads, blocks, D, E] over the marginal blocks of each row."""
    return (mixing @ states.flatten(2)).unflatten(2, states.shape[2:])


def _head_groups(q: torch.Tensor, v: torch.Tensor, order: TokenOrder) -> Iterator[tuple[int, slice]]:
    """(sample, heads) such that the states of these heads fit the budget, one head at least."""
    head_bytes = 2 * order.visual_blocks * q.shape[-1] * (v.shape[-1] + 1) * 4
    step = max(1, _STATE_BYTES // head_bytes)
    for sample in range(q.shape[0]):
        for first in range(0, q.shape[1], step):
            yield sample, slice(first, first + step)


def _column_groups(values: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, ...]:
    """The columns of [heads, blocks, block, E] in groups whose states fit the budget."""
    column_bytes = 2 * values.shape[0] * order.visual_blocks * values.shape[-1] * 4
    return values.split(max(1, _STATE_BYTES // column_bytes), dim=-1)
