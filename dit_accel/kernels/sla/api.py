"""The public operator of sparse-linear attention: checks, routing and dispatch. README.md has the equations."""

from __future__ import annotations

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import gradients_follow
from dit_accel.kernels.impls import Facts
from dit_accel.kernels.sla.arguments import FEATURE_MAPS, LINEAR_SCOPES, SlaArguments

# A traced call can only take modules that are loaded.
for _row in impls.ROWS:
    if _row.kernel == impls.SLA:
        _row.load()


def sparse_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SlaArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the visual queries: critical key blocks exactly, plus projected linear attention over the others.

    A query attends in one softmax to the critical blocks of its own block and to every conditioning and text token. To
    this ``o_l @ weight.T + bias`` is added, where o_l is linear attention over all visual keys, or over those in
    marginal blocks. Differentiable in q, k, v and all weights; routing has no gradient.

    Source: SLA (arXiv 2509.24006): its equations for scope "marginal", its published code (thu-ml/SLA) for "all".

    Args:
        q, k, v: [B, H, N, D] in model order, floating point, any strides; the whole sequence.
        call: the other arguments.

    Returns:
        The output [B, H, visual, D] in the dtype of q, laid out as [B, visual, H, D] in memory. The critical blocks
        that the router chose, int32 [B, H, query blocks, topk], ascending.

    Raises:
        DitAccelError: shapes, counts or names do not fit, or `impl` cannot run here.

    Example:
        >>> q = k = v = torch.randn(1, 4, 8192, 64)
        >>> order = TokenOrder(TokenGrid(8, 32, 32), 64)
        >>> call = SlaArguments(torch.zeros(64, 64), None, order, order, topk=6, scale=0.125)
        >>> sparse_linear_attention(q, k, v, call)[0].shape
        torch.Size([1, 4, 8192, 64])
    """
    _check(q, k, v, call)
    text_len, text_bias = call.text_len, call.text_bias
    linear = {"linear_scope": call.linear_scope, "feature_map": call.feature_map, "critical": call.topk}
    gradients = gradients_follow(q, k, v, call.weight)
    facts = Facts.of(q.device, q.dtype, q.shape[-1], call.query_order, call.key_order, gradients=gradients, **linear)
    chosen, _ = impls.choose(facts, call.impl, impls.SLA)
    call = call._replace(
        skip=call.skip if call.linear_scope == "marginal" else 0,
        text_len=None if text_len is None else text_len.to(device=q.device, dtype=torch.int32),
        text_bias=None if text_bias is None else text_bias.to(q.device),
        impl=chosen.name,
    )
    return chosen.load().forward(q, k, v, call)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SlaArguments) -> None:
    grid, blocks, dim, (topk, skip) = call.grid, call.key_order.visual_blocks, q.shape[-1], (call.topk, call.skip)
    if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != grid.tokens:
        raise DitAccelError(
            f"q, k and v must be [batch, heads, {grid.tokens}, head_dim], all alike, for the grid {grid}; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise DitAccelError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if call.weight.shape != (dim, dim) or (call.bias is not None and call.bias.shape != (dim,)):
        got = [None if x is None else tuple(x.shape) for x in (call.weight, call.bias)]
        raise DitAccelError(
            f"weight must be [{dim}, {dim}] and bias [{dim}] for this head_dim, got {got[0]}, {got[1]}."
        )
    if min(topk, skip) < 0 or topk + skip > blocks:
        raise DitAccelError(
            f"topk and skip must be at least 0, and both together at most the {blocks} visual blocks; got {topk} and "
            f"{skip}."
        )
    shapes = None if call.features is None else [tuple(x.shape) for x in call.features]
    wanted = [[(2, heads, dim, dim), (2, heads, dim)] for heads in {1, q.shape[1]}]
    if (call.feature_map == "hedgehog") != (shapes is not None) or (shapes and shapes not in wanted):
        raise DitAccelError(
            f"feature_map='hedgehog' alone takes features, and needs them as [2, heads, {dim}, {dim}] and "
            f"[2, heads, {dim}] for 1 or the {q.shape[1]} heads of q; got {shapes} with {call.feature_map!r}."
        )
    for name, value, known in (
        ("feature_map", call.feature_map, FEATURE_MAPS),
        ("linear_scope", call.linear_scope, LINEAR_SCOPES),
        ("impl", call.impl, impls.names(impls.SLA)),
    ):
        if value not in known:
            raise DitAccelError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
