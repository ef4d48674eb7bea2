"""Sparse-linear attention by the Triton kernels. Triton itself is imported when an op runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.kernels.sla import ops
from dit_accel.kernels.sla.exact import attend_visual, visual_of, with_others
from dit_accel.kernels.sla.setting import Setting


def sparse_linear_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    setting: Setting,
) -> torch.Tensor:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`.

    In scope "all" the projection is applied to the D x D state, and the linear branch added to the exact one where it
    is computed, so that nothing of the size of q is written besides the two results.

    Args:
        critical, skipped: block lists of the router, int32 [B, H, visual_blocks, *].
    """
    order = setting.order
    visual = attend_visual(q, k, v, critical, setting, "triton")
    if setting.weight is not None:
        queries, keys, values = (visual_of(x, order) for x in (q, k, v))
        bias = None if setting.bias is None else setting.bias.float()
        if setting.linear_scope == "all":
            state, total = ops.state(keys, values, setting.feature_map)
            visual = ops.apply(queries, visual, state @ setting.weight.float().mT, total, bias, setting.feature_map)
        else:
            linear, *_ = ops.marginal(
                queries, keys, values, critical, skipped, order.grid.shape, order.block, order.tile, setting.feature_map
            )
            projected = F.linear(linear, setting.weight.to(q.dtype), None if bias is None else bias.to(q.dtype))
            visual = visual + projected
    return with_others(visual, q, k, v, setting, "triton")
