"""The public operator of sparse-linear attention: checks, routing and dispatch."""

from __future__ import annotations

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Facts, Impl, Implementation
from dit_accel.kernels.sla import ops
from dit_accel.kernels.sla.exact import visual_of
from dit_accel.kernels.sla.features import FEATURE_MAPS, FeatureMap
from dit_accel.kernels.sla.fused import sparse_linear_fused
from dit_accel.kernels.sla.layout import Cut
from dit_accel.kernels.sla.portable import sparse_linear_portable
from dit_accel.kernels.sla.reference import sparse_linear_reference
from dit_accel.kernels.sla.router import route_blocks
from dit_accel.kernels.sla.setting import LINEAR_SCOPES, LinearScope, Setting
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid


def sparse_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    critical: int,
    skipped: int = 0,
    block: int = 64,
    grid: tuple[int, int, int] | None = None,
    tile: tuple[int, int, int] | None = None,
    conditioning: int = 0,
    text: int = 0,
    text_first: bool = False,
    text_len: torch.Tensor | None = None,
    text_bias: torch.Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "all",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Exact attention over each query block's best key blocks, plus projected linear attention over the rest.

    Visual queries attend exactly, in one softmax, to the `critical` visual blocks that the router keeps for their block
    and to every conditioning and text token; to that comes ``o_l @ weight.T + bias``, where o_l is linear attention
    over visual keys: all of them, or those in blocks that are neither kept nor dropped. Conditioning and text queries
    attend exactly to everything and get no linear term. Differentiable in q, k, v, weight and bias; routing
    has no gradient.

    Source: SLA (arXiv 2509.24006): its equations for scope "marginal", its published code (thu-ml/SLA) for "all".

    Args:
        q, k, v: [B, H, N, D] in model order, floating point, any strides.
        critical: visual key blocks kept by every query block.
        skipped: lowest visual key blocks that scope "marginal" leaves out of the linear branch; "all" ignores it.
        block: tokens a query and a key block hold.
        grid: (frames, rows, columns) of the visual tokens; None: all N tokens are visual, in one row.
        tile: (t, h, w) for blocks that are 3-D tiles, None for runs in raster order.
        conditioning, text: conditioning and text tokens in the sequence; they stand behind the visual ones, text last.
        text_first: text stands before the visual tokens.
        text_len: int [B], valid text tokens of each sample; text behind them is never a key. None: all of them.
        text_bias: floating point [B, N]: text behind `text_len` is a key after all, and this is what each query adds to
            its logits.
        scale: factor of the logits; D ** -0.5 if None.
        feature_map: "softmax" (over the head dimension), "elu" (plus one) or "relu".
        linear_scope: "all" or "marginal".
        weight, bias: projection of the linear branch, [D, D] and [D], cast to the dtype of q; without `weight` there is
            no linear branch.
        impl: "auto", "reference", "portable" or "triton"; a named one runs or raises.

    Returns:
        [B, H, N, D] in the dtype of q, laid out as [B, N, H, D] in memory.

    Raises:
        DitAccelError: shapes, counts or names do not fit, or `impl` cannot run here.

    Example:
        >>> q = k = v = torch.randn(1, 4, 8192, 64)
        >>> sparse_linear_attention(q, k, v, critical=6, weight=torch.zeros(64, 64)).shape
        torch.Size([1, 4, 8192, 64])
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    frames, rows, columns = (1, 1, q.shape[-2]) if grid is None else grid
    layout = TokenGrid(frames, rows, columns, text=text, text_first=text_first, conditioning=conditioning)
    setting = Setting(
        order=TokenOrder(layout, block, tile),
        text_len=None if text_len is None else text_len.to(device=q.device, dtype=torch.int32),
        text_bias=None if text_bias is None else text_bias.to(q.device),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        feature_map=feature_map,
        linear_scope=linear_scope,
        weight=weight,
        bias=bias,
    )
    _check(q, k, v, critical, skipped, setting, impl)
    skipped = skipped if linear_scope == "marginal" else 0
    scope = None if weight is None else linear_scope
    chosen, _ = choose_impl(q.device, q.dtype, q.shape[-1], setting.order, scope, impl)
    name = chosen.name
    # Scores and linear sums are fp32 whatever autocast says.
    with torch.autocast(q.device.type, enabled=False):
        if name == "triton":
            return sparse_linear_fused(q, k, v, critical, skipped, setting)
        kept, dropped = route(q, k, setting.order, critical, skipped, impl)
        if name == "reference":
            return sparse_linear_reference(q, k, v, kept, dropped, setting)
        return sparse_linear_portable(q, k, v, kept, dropped, setting, impl)


def choose_impl(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    order: TokenOrder,
    linear_scope: LinearScope | None,
    impl: Impl = "auto",
) -> tuple[Implementation, str]:
    """The implementation that a call gets, and why; as `impls.choose`.

    Args:
        device, dtype, head_dim: of the call's queries.
        order: its sequence and blocks.
        linear_scope: None for a call without linear branch, and for the router alone.
        impl: "auto" or a name.

    Raises:
        DitAccelError: a named implementation cannot compute the call.
    """
    facts = Facts(
        device, dtype, head_dim, order.block, order.block, visual_blocks=order.visual_blocks, linear_scope=linear_scope
    )
    return impls.choose(facts, impl, impls.SLA)


def route(
    q: torch.Tensor, k: torch.Tensor, order: TokenOrder, critical: int, skipped: int, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's lists for a call; see `dit_accel.kernels.sla.router.route_blocks`.

    Args:
        q, k: the whole sequence, [B, H, N, D].
    """
    cut = Cut.of(order).pack()
    chosen, _ = choose_impl(q.device, q.dtype, q.shape[-1], order, None, impl)
    routing = ops.route if chosen.name == "triton" else route_blocks
    return routing(visual_of(q, order).detach(), visual_of(k, order).detach(), cut, critical, skipped)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, critical: int, skipped: int, setting: Setting, impl: str
) -> None:
    order = setting.order
    if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != order.grid.tokens:
        raise DitAccelError(
            f"q, k and v must be [batch, heads, {order.grid.tokens}, head_dim], all alike, for the grid {order.grid}; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise DitAccelError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    dim, weight, bias = q.shape[-1], setting.weight, setting.bias
    if (weight is not None and weight.shape != (dim, dim)) or (bias is not None and bias.shape != (dim,)):
        got = [None if x is None else tuple(x.shape) for x in (weight, bias)]
        raise DitAccelError(
            f"weight must be [{dim}, {dim}] and bias [{dim}] for this head_dim, got {got[0]}, {got[1]}."
        )
    if critical < 1 or skipped < 0 or critical + skipped > order.visual_blocks:
        raise DitAccelError(
            f"critical must be at least 1, skipped at least 0, and both together at most the {order.visual_blocks} "
            f"visual blocks; got {critical} and {skipped}."
        )
    for name, value, known in (
        ("feature_map", setting.feature_map, FEATURE_MAPS),
        ("linear_scope", setting.linear_scope, LINEAR_SCOPES),
        ("impl", impl, impls.names(impls.SLA)),
    ):
        if value not in known:
            raise DitAccelError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
