"""Sparse-linear attention by the Triton kernels. Triton itself is imported when an op runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.kernels.sla import ops
from dit_accel.kernels.sla.exact import attend_visual, visual_of, with_others
from dit_accel.kernels.sla.layout import Cut
from dit_accel.kernels.sla.setting import Setting


def sparse_linear_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, critical: int, skipped: int, setting: Setting
) -> torch.Tensor:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`.

    With a linear branch, the means of the key blocks come from the pass over k that sums its state. In scope "all" the
    projection is applied to the D x D state, and the linear branch added to the exact one where it is computed, so that
    nothing of the size of q is written besides the two results.

    Args:
        critical, skipped: key blocks that the router keeps and drops for each query block.
    """
    order, feature_map = setting.order, setting.feature_map
    cut = Cut.of(order).pack()
    queries, keys, values = (visual_of(x, order) for x in (q, k, v))
    if setting.weight is None:
        kept, _ = ops.route(queries.detach(), keys.detach(), cut, critical, skipped)
        return with_others(attend_visual(q, k, v, kept, setting, "triton"), q, k, v, setting, "triton")
    state, total, key_means = ops.state(keys, values, cut, feature_map)
    query_means = ops.block_means(queries.detach(), cut)
    kept, dropped = ops.select(query_means, key_means, critical, skipped)
    visual = attend_visual(q, k, v, kept, setting, "triton")
    bias = None if setting.bias is None else setting.bias.float()
    if setting.linear_scope == "all":
        visual = ops.apply(queries, visual, state @ setting.weight.float().mT, total, bias, feature_map)
    else:
        whole = state.detach(), total.detach()
        linear, *_ = ops.marginal(queries, keys, values, *whole, kept, dropped, cut, feature_map)
        projected = F.linear(linear, setting.weight.to(q.dtype), None if bias is None else bias.to(q.dtype))
        visual = visual + projected
    return with_others(visual, q, k, v, setting, "triton")
