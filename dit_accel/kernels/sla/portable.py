"""Sparse-linear attention in plain PyTorch that skips the work: block-sparse attention plus the linear branch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.api import Impl, block_sparse_attention
from dit_accel.kernels.block_sparse.geometry import Shape
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
    order, weight = setting.order, setting.weight
    grid = order.grid
    front, back = grid.visual_start, grid.visual_start + grid.visual
    queries, keys, values = (x[:, :, front:back] for x in (q, k, v))
    # [B, H, visual_blocks, kept + dense]: every row also lists all reference and text blocks, which come last.
    dense = torch.arange(order.visual_blocks, order.blocks, dtype=torch.int32, device=q.device)
    lists = torch.cat([critical, dense.expand(*critical.shape[:3], -1)], dim=-1)
    visual = _attend(queries, k, v, lists, setting, grid.shape, order.tile, impl)
    if weight is not None:
        if setting.linear_scope == "all":
            projected = linear_all(queries, keys, values, setting.feature_map, weight)
        else:
            linear, _ = linear_marginal(
                queries, keys, values, critical, skipped, grid.shape, order.block, order.tile, setting.feature_map
            )
            projected = F.linear(linear, weight.to(linear.dtype))
        if setting.bias is not None:
            projected = projected + setting.bias
        # The sum takes the layout of its first term, [B, N, H, D] in memory, so that the model's flatten stays free.
        visual = visual + projected.to(q.dtype)
    if not order.dense_blocks:
        return visual

    others = torch.cat([q[:, :, :front], q[:, :, back:]], dim=2)
    rows = math.ceil(others.shape[2] / order.block)
    lists = torch.arange(order.blocks, dtype=torch.int32, device=q.device).expand(rows, -1)
    around = _attend(others, k, v, lists, setting, (1, 1, others.shape[2]), None, impl)
    pieces = [around[:, :, :front], visual, around[:, :, front:]]
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)


def _attend(
    q, k, v, lists: torch.Tensor, setting: Setting, query_grid: Shape, tile_q: Shape | None, impl: Impl
) -> torch.Tensor:
    """Exact attention of some queries, a grid of their own, over the listed blocks of all keys."""
    order, grid = setting.order, setting.order.grid
    names = ("visual_start", "reference_start", "text_start")
    starts = {name: q.new_full(q.shape[:1], getattr(grid, name), dtype=torch.int32) for name in names}
    return block_sparse_attention(
        q,
        k,
        v,
        lists.contiguous(),
        lists.new_full(lists.shape[:-1], lists.shape[-1]),
        block_q=order.block,
        block_k=order.block,
        grid=grid.shape,
        query_grid=query_grid,
        tile_q=tile_q,
        tile_k=order.tile,
        reference=grid.reference,
        text=grid.text,
        **starts,
        text_len=setting.text_len,
        scale=setting.scale,
        impl=impl,
    )
