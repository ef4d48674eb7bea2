"""Sparse-linear attention by the Triton kernels. Triton itself is imported when an op runs."""

from __future__ import annotations

import torch

from dit_accel.kernels.sla import ops
from dit_accel.kernels.sla.exact import attend_visual, visual_of, with_others
from dit_accel.kernels.sla.layout import Cut, Segments
from dit_accel.kernels.sla.setting import Setting
from dit_accel.tokens import TokenGrid


def sparse_linear_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, critical: int, skipped: int, setting: Setting
) -> torch.Tensor:
    """See `dit_accel.kernels.sla.api.sparse_linear_attention`.

    With a linear branch, the means of the key blocks come from the pass over k that sums its state, and one kernel
    computes both branches of the visual queries. Without one, they go through the block-sparse engine.

    Args:
        critical, skipped: key blocks that the router keeps and drops for each query block.
    """
    order, cut = setting.order, Cut.of(setting.order).pack()
    queries, keys, values = (visual_of(x, order) for x in (q, k, v))
    if setting.weight is None:
        kept, _ = ops.route(queries.detach(), keys.detach(), cut, critical, skipped)
        visual = attend_visual(q, k, v, kept, setting, "triton")
        return with_others(visual, q, k, v, setting, "triton")
    state, total, key_means = ops.state(keys.detach(), values.detach(), cut, setting.feature_map)
    kept, dropped = ops.select(ops.block_means(queries.detach(), cut), key_means, critical, skipped)
    if setting.text_bias is None:
        visual = _both(queries, k, v, (state, total), kept, dropped, setting, order.grid)
    else:
        # Text that is weighed joins the exact branch by its log-sum-exp, so that branch is the engine's.
        rest = torch.cat([kept, dropped], dim=-1) if setting.linear_scope == "marginal" else dropped
        alone = TokenGrid(*order.grid.shape)
        visual = attend_visual(q, k, v, kept, setting, "triton")
        visual = visual + _both(queries, keys, values, (state, total), kept[..., :0], rest.sort(-1)[0], setting, alone)
    return with_others(visual, q, k, v, setting, "triton")


def _both(
    queries: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, torch.Tensor],
    kept: torch.Tensor,
    dropped: torch.Tensor,
    setting: Setting,
    grid: TokenGrid,
) -> torch.Tensor:
    """The fused kernel's output for visual queries over keys that lie as in `grid`."""
    weight, bias, text_len = setting.weight, setting.bias, setting.text_len
    assert weight is not None
    if text_len is None or not grid.text:
        text_len = torch.full(queries.shape[:1], grid.text, dtype=torch.int32, device=queries.device)
    wanted = (queries, k, v, weight, *([] if bias is None else [bias]))
    training = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    out, *_ = ops.attend(
        queries, k, v, *whole, kept, dropped, weight.float(), None if bias is None else bias.float(), text_len,
        Cut.of(setting.order).pack(), list(Segments.of(grid)), setting.scale, setting.feature_map,
        setting.linear_scope, training,
    )  # fmt: skip
    return out
