"""The router and the linear branch in plain PyTorch, and calls made of them and the block-sparse engine.

README.md in this folder has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.sla.call import (
    EPSILON,
    Cut,
    FeatureMap,
    SlaCall,
    apply_map,
    from_blocks,
    pull_back,
    to_blocks,
    visual_of,
)
from dit_accel.order import TokenOrder

# Elements of the score map held at once, so that a long sequence has no blocks x blocks map for every head.
_SCORES_AT_ONCE = 1 << 22
# Bytes of block states held at once.
_STATE_BYTES = 1 << 26


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, topk: int, skip: int, call: SlaCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`; returns the output and the critical blocks."""
    order, weight, cut = call.order, call.weight, Cut.of(call.order).pack()
    queries, keys, values = (visual_of(x, order.grid) for x in (q, k, v))
    critical, negligible = route(queries.detach(), keys.detach(), cut, topk, skip)
    exact, _ = attend_visual(
        q, k, v, BlockLists.full(critical), order, order,
        text_lens=call.text_len, text_bias=call.text_bias, scale=call.scale, impl="portable",
    )  # fmt: skip
    if call.linear_scope == "all":
        projected = linear_all(queries, keys, values, call.feature_map, weight)
    else:
        linear, _ = linear_marginal(queries, keys, values, critical, negligible, Cut.of(order).pack(), call.feature_map)
        projected = F.linear(linear, weight.to(linear.dtype))
    if call.bias is not None:
        projected = projected + call.bias
    # The sum has the memory layout of its first term, [B, N, H, D], so that the model's flatten copies nothing.
    return exact + projected.to(q.dtype), critical


@torch.library.custom_op("dit_accel::sla_route", mutates_args=())
def route(
    q: torch.Tensor, k: torch.Tensor, cut: Sequence[int], topk: int, skip: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Critical and negligible key blocks of every query block. No gradient flows through the choice.

    Key blocks are ranked by ``mean(q block) . mean(k block)`` over the tokens that exist, in fp32 (fp64 for fp64
    input). Of equal scores the lower index ranks higher. The first `topk` are critical, the last `skip` negligible. The
    same input gives the same lists on every run.

    Source: SLA (arXiv 2509.24006), equations 2 and 3; thu-ml/SLA, sparse_linear_attention/utils.py. The published code
    subtracts the mean key first. This adds a constant to a row of scores and cannot change its order.

    Args:
        q, k: visual tokens in raster order, [B, H, visual, D], any strides.
        cut: how they are cut into blocks, as `call.Cut.pack` returns it.
        topk, skip: critical and negligible blocks in every row; at least 1 and 0, together at most all blocks.

    Returns:
        Both lists, ascending: int32 [B, H, blocks, topk] and int32 [B, H, blocks, skip].
    """
    order = Cut.unpack(cut).order
    queries, keys = block_means(q, order), block_means(k, order)
    batch, heads, blocks, _ = queries.shape
    rows = max(1, _SCORES_AT_ONCE // max(1, batch * heads * blocks))
    critical, negligible = [], []
    for part in queries.split(rows, dim=2):
        scores = torch.nan_to_num(part @ keys.mT, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        critical.append(highest(scores, topk))
        negligible.append(lowest(scores, skip))
    return torch.cat(critical, dim=2), torch.cat(negligible, dim=2)


@route.register_fake
def _(q, k, cut, topk, skip):
    rows = *q.shape[:2], Cut.unpack(cut).blocks
    return tuple(q.new_empty((*rows, n), dtype=torch.int32) for n in (topk, skip))


def block_means(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean of every block's tokens: [B, H, visual, D] to [B, H, blocks, D], fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if order.tile is not None:
        held = to_blocks(x.new_ones(order.grid.visual, 1, dtype=wide), order).sum(-2)
        return to_blocks(x, order).sum(-2, dtype=wide) / held
    whole = order.grid.visual // order.block
    runs = x[..., : whole * order.block, :].unflatten(-2, (whole, order.block)) if whole else x[..., :0, None, :]
    means = runs.mean(-2, dtype=wide)
    tail = x[..., whole * order.block :, :]
    return torch.cat([means, tail.mean(-2, keepdim=True, dtype=wide)], dim=-2) if tail.shape[-2] else means


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` highest scores, the first of equal ones: int32 [..., count], ascending."""
    width = scores.shape[-1]
    if count == 0:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int32)
    # `topk` does not define which of equal scores it returns, so only its threshold is used
    threshold = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    positions = torch.arange(width, dtype=torch.int32, device=scores.device)
    return torch.where(chosen, positions, width).topk(count, largest=False, sorted=True).values


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` lowest scores, the last of equal ones: int32 [..., count], ascending."""
    return scores.shape[-1] - 1 - highest(-scores.flip(-1), count).flip(-1)


def linear_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: FeatureMap, weight: torch.Tensor
) -> torch.Tensor:
    """Linear attention over all keys with the projection applied, fp32 or fp64 [B, H, N, D].

    Args:
        q, k, v: [B, H, N, D].
        weight: the projection, [D, D]. It is applied to the D x D state instead of N rows.
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
    negligible: torch.Tensor,
    cut: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of every query block over its marginal key blocks.

    The states phi(k)^T v of the marginal blocks are summed directly, by a product with a 0/1 matrix of blocks. Nothing
    is subtracted, so nothing cancels. The sum of phi(k) is one more column of v. States exist for a few heads and
    columns of v at a time, and the backward recomputes them.

    Args:
        q, k, v: visual tokens in raster order, [B, H, visual, D], any strides.
        critical, negligible: the router's lists, int32 [B, H, blocks, *].
        cut: as for `route`.
        feature_map: as for `call.apply_map`.

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
        mixing = _marginal_blocks(critical[at], negligible[at], wide)
        parts = [a @ _mix(mixing, b.mT @ columns) for columns in _column_groups(values, order)]
        numerator = from_blocks(torch.cat(parts, dim=-1), order)
        denominator[at] = numerator[..., -1:] + EPSILON
        out[at] = numerator[..., :-1] / denominator[at]
    return out, denominator


@linear_marginal.register_fake
def _(q, k, v, critical, negligible, cut, feature_map):
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape, dtype=wide), v.new_empty((*v.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("dit_accel::sla_linear_marginal_backward", mutates_args=())
def linear_marginal_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    negligible: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    cut: Sequence[int],
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of `linear_marginal`, with the dtypes and shapes of q, k and v."""
    order = Cut.unpack(cut).order
    wide = out.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for at in _head_groups(q, v, order):
        query, key = q[at].to(wide), k[at].to(wide)
        phi_q, phi_k = apply_map(query, feature_map), apply_map(key, feature_map)
        a, b = to_blocks(phi_q, order), to_blocks(phi_k, order)
        values = to_blocks(_with_ones(v[at].to(wide)), order)
        scaled = gradient[at].to(wide) / denominator[at]
        # gradient of the quotient: g / d for the columns of v, -(g . o) / d for the column of ones
        of_numerator = torch.cat([scaled, -(scaled * out[at]).sum(-1, keepdim=True)], dim=-1)
        of_numerator = to_blocks(of_numerator, order)
        mixing = _marginal_blocks(critical[at], negligible[at], wide)
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
def _(gradient, q, k, v, critical, negligible, out, denominator, cut, feature_map):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, critical, negligible, *ctx.setting = inputs
    out, denominator = output
    ctx.save_for_backward(q, k, v, critical, negligible, out, denominator)


def _differentiate(ctx, gradient, _):
    gradients = linear_marginal_backward(gradient, *ctx.saved_tensors, *ctx.setting)
    return *gradients, None, None, None, None


linear_marginal.register_autograd(_differentiate, setup_context=_save)


def _with_ones(v: torch.Tensor) -> torch.Tensor:
    return torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)


def _marginal_blocks(critical: torch.Tensor, negligible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where a key block is marginal, 0 elsewhere: [heads, blocks, blocks]."""
    mixing = torch.ones((*critical.shape[:2], critical.shape[1]), dtype=dtype, device=critical.device)
    return mixing.scatter_(-1, torch.cat([critical, negligible], dim=-1).long(), 0)


def _mix(mixing: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sums of the states [heads, blocks, D, E] over the marginal blocks of each row."""
    return (mixing @ states.flatten(2)).unflatten(2, states.shape[2:])


def _head_groups(q: torch.Tensor, v: torch.Tensor, order: TokenOrder) -> Iterator[tuple[int, slice]]:
    """(sample, heads) whose states fit the memory limit, at least one head at a time."""
    head_bytes = 2 * order.visual_blocks * q.shape[-1] * (v.shape[-1] + 1) * 4
    step = max(1, _STATE_BYTES // head_bytes)
    for sample in range(q.shape[0]):
        for first in range(0, q.shape[1], step):
            yield sample, slice(first, first + step)


def _column_groups(values: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, ...]:
    """The columns of [heads, blocks, block, E] in groups whose states fit the memory limit."""
    column_bytes = 2 * values.shape[0] * order.visual_blocks * values.shape[-1] * 4
    return values.split(max(1, _STATE_BYTES // column_bytes), dim=-1)
