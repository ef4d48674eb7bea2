"""The public operator of sparse-linear attention: checks, routing and dispatch. README.md has the equations."""

from __future__ import annotations

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.impls import AUTO, Facts, Impl
from dit_accel.kernels.sla.call import FEATURE_MAPS, LINEAR_SCOPES, FeatureMap, LinearScope, SlaCall
from dit_accel.order import TokenOrder

# A traced call can only take modules that are loaded.
for _row in impls.ROWS:
    if _row.kernel == impls.SLA:
        _row.load()


def sparse_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    query_order: TokenOrder,
    key_order: TokenOrder,
    topk: int,
    skip: int = 0,
    text_len: torch.Tensor | None = None,
    text_bias: torch.Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = "softmax",
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
    linear_scope: LinearScope = "all",
    impl: Impl = AUTO,
    lists: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the visual queries: critical key blocks exactly, plus projected linear attention over the others.

    A query attends in one softmax to the critical blocks of its own block and to every conditioning and text token. To
    this ``o_l @ weight.T + bias`` is added, where o_l is linear attention over all visual keys, or over those in
    marginal blocks. Differentiable in q, k, v and all weights; routing has no gradient.

    Source: SLA (arXiv 2509.24006): its equations for scope "marginal", its published code (thu-ml/SLA) for "all".

    Args:
        q, k, v: [B, H, N, D] in model order, floating point, any strides; the whole sequence.
        weight, bias: projection of the linear branch, [D, D] and [D], cast to the dtype of q.
        query_order, key_order: how the sequence is cut into blocks of queries and blocks of keys; of one grid.
        topk: critical key blocks of every query block. 0: the exact branch covers conditioning and text alone; its
            output is 0 where there are none.
        skip: negligible key blocks of every query block in scope "marginal"; scope "all" has none.
        text_len: int [B], valid text tokens of each sample; text behind them is never a key. None: all of them.
        text_bias: floating point [B, N]: text behind `text_len` is a key after all, and each query adds its value to
            the logits of that text.
        scale: factor of the logits; D ** -0.5 if None.
        feature_map: "softmax", "elu", "relu", "focused" or "hedgehog"; see `call.apply_map`.
        features: weight and bias of "hedgehog", [2, H or 1, D, D] and [2, H or 1, D]; see `call.learned_inputs`.
        linear_scope: "all" or "marginal".
        impl: "auto", or the name of an implementation, which runs or raises.
        lists: critical and negligible blocks by another score, as from `router.api.classify`; None: by block means.

    Returns:
        The output [B, H, visual, D] in the dtype of q, laid out as [B, visual, H, D] in memory. The critical blocks
        that the router chose, int32 [B, H, query blocks, topk], ascending.

    Raises:
        DitAccelError: shapes, counts or names do not fit, or `impl` cannot run here.

    Example:
        >>> q = k = v = torch.randn(1, 4, 8192, 64)
        >>> order = TokenOrder(TokenGrid(8, 32, 32), 64)
        >>> orders = {"query_order": order, "key_order": order}
        >>> sparse_linear_attention(q, k, v, torch.zeros(64, 64), **orders, topk=6)[0].shape
        torch.Size([1, 4, 8192, 64])
    """
    call = SlaCall(
        query_order=query_order,
        key_order=key_order,
        text_len=None if text_len is None else text_len.to(device=q.device, dtype=torch.int32),
        text_bias=None if text_bias is None else text_bias.to(q.device),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        feature_map=feature_map,
        linear_scope=linear_scope,
        weight=weight,
        bias=bias,
        features=features,
        impl=impl,
        lists=lists,
    )
    _check(q, k, v, topk, skip, call)
    skip = skip if linear_scope == "marginal" else 0
    linear = {"linear_scope": linear_scope, "feature_map": feature_map, "critical": topk}
    facts = Facts.of(q.device, q.dtype, q.shape[-1], query_order, key_order, **linear)
    chosen, _ = impls.choose(facts, impl, impls.SLA)
    return chosen.load().forward(q, k, v, topk, skip, call._replace(impl=chosen.name))


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, topk: int, skip: int, call: SlaCall) -> None:
    grid, blocks, dim = call.grid, call.key_order.visual_blocks, q.shape[-1]
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
