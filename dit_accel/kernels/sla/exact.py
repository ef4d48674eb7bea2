"""The exact part of sparse-linear attention: critical and surrounding blocks, through the block-sparse engine."""

from __future__ import annotations

import math

import torch

from dit_accel.kernels.block_sparse.api import block_sparse_attention
from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.kernels.impls import Impl
from dit_accel.kernels.sla.setting import Setting
from dit_accel.order import TokenOrder


def attend_visual(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, critical: torch.Tensor, setting: Setting, impl: Impl
) -> torch.Tensor:
    """Visual queries over their critical blocks and over all conditioning and text tokens.

    Args:
        q, k, v: the whole sequence, [B, H, N, D].
        critical: the router's lists, int32 [B, H, visual_blocks, kept].
        impl: who computes it.

    Returns:
        [B, H, visual, D], laid out in memory as [B, visual, H, D].
    """
    order = setting.order
    if order.dense_blocks:
        # [B, H, visual_blocks, kept + dense]: every row also lists all conditioning and text blocks, which come last.
        dense = torch.arange(order.visual_blocks, order.blocks, dtype=torch.int32, device=q.device)
        critical = torch.cat([critical, dense.expand(*critical.shape[:3], -1)], dim=-1)
    bias = None if setting.text_bias is None else setting.text_bias[:, _visual(order)]
    return _attend(visual_of(q, order), k, v, critical, setting, bias, order.grid.shape, order.tile, impl)


def with_others(
    visual: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting, impl: Impl
) -> torch.Tensor:
    """The whole output [B, H, N, D]: conditioning and text queries attend to everything, around `visual`."""
    order = setting.order
    if not order.dense_blocks:
        return visual
    front, back = _visual(order).start, _visual(order).stop
    others = torch.cat([q[:, :, :front], q[:, :, back:]], dim=2)
    bias = setting.text_bias
    if bias is not None:
        bias = torch.cat([bias[:, :front], bias[:, back:]], dim=1)
    rows = math.ceil(others.shape[2] / order.block)
    lists = torch.arange(order.blocks, dtype=torch.int32, device=q.device).expand(rows, -1)
    around = _attend(others, k, v, lists, setting, bias, (1, 1, others.shape[2]), None, impl)
    pieces = [around[:, :, :front], visual, around[:, :, front:]]
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1).transpose(1, 2)


def visual_of(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """The visual tokens of [B, H, N, D]: a view, and x itself where there are no others."""
    # the gradient of a slice, even of a whole one, is a copy into zeros
    return x if order.grid.visual == order.grid.tokens else x[:, :, _visual(order)]


def _visual(order: TokenOrder) -> slice:
    start = order.grid.visual_start
    return slice(start, start + order.grid.visual)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    setting: Setting,
    text_bias: torch.Tensor | None,
    query_grid: Shape,
    tile_q: Shape | None,
    impl: Impl,
) -> torch.Tensor:
    """Exact attention of some queries, a grid of their own, over the listed blocks of all keys."""
    order, grid = setting.order, setting.order.grid
    visual_start, conditioning_start, text_start = (
        q.new_full(q.shape[:1], start, dtype=torch.int32)
        for start in (grid.visual_start, grid.conditioning_start, grid.text_start)
    )
    out = block_sparse_attention(
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
        conditioning=grid.conditioning,
        text=grid.text,
        visual_start=visual_start,
        conditioning_start=conditioning_start,
        text_start=text_start,
        text_len=setting.text_len,
        text_bias=text_bias,
        scale=setting.scale,
        impl=impl,
    )
    assert isinstance(out, torch.Tensor)  # a tuple comes only with return_lse
    return out
