"""Sparse-linear attention in plain PyTorch that skips the work: block-sparse attention plus the linear branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.kernels.impls import Impl
from dit_accel.kernels.sla.exact import attend_visual, visual_of, with_others
from dit_accel.kernels.sla.layout import Cut
from dit_accel.kernels.sla.linear import linear_all, linear_marginal
from dit_accel.kernels.sla.setting import Setting


def sparse_linear_portable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    setting: Setting,
    impl: Impl,
) -> torch.Tensor:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`.

    Args:
        critical, skipped: block lists of the router, int32 [B, H, visual_blocks, *].
        impl: who computes the critical blocks, "auto" or "portable".
    """
    weight = setting.weight
    visual = attend_visual(q, k, v, critical, setting, impl)
    if weight is not None:
        queries, keys, values = (visual_of(x, setting.order) for x in (q, k, v))
        if setting.linear_scope == "all":
            projected = linear_all(queries, keys, values, setting.feature_map, weight)
        else:
            linear, _ = linear_marginal(
                queries, keys, values, critical, skipped, Cut.of(setting.order).pack(), setting.feature_map
            )
            projected = F.linear(linear, weight.to(linear.dtype))
        if setting.bias is not None:
            projected = projected + setting.bias
        # The sum takes the layout of its first term, [B, N, H, D] in memory, so that the model's flatten stays free.
        visual = visual + projected.to(q.dtype)
    return with_others(visual, q, k, v, setting, impl)
