"""Tensors of visual tokens in blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_accel.order import TokenOrder, valid_tokens
from dit_accel.tokens import TokenGrid


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x with a distance of 1 between channels, which kernels take for granted; models pass such tensors already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def visual_of(x: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The visual tokens of [B, H, N, D]: a view, or x itself if all tokens are visual."""
    # autograd copies the gradient of a slice into zeros, even if the slice is the whole tensor
    return x if grid.visual == grid.tokens else x[:, :, grid.visual_rows]


def to_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., visual, D] in raster order to [..., blocks, block, D]; padding slots are 0."""
    if order.tile is not None:
        x = x.unflatten(-2, order.grid.shape)
        columns, rows, frames = (-n % size for n, size in zip(order.grid.shape[::-1], order.tile[::-1], strict=True))
        if columns or rows or frames:
            x = F.pad(x, (0, 0, 0, columns, 0, rows, 0, frames))
        for axis, count in zip((-4, -3, -2), order.tiles, strict=True):
            x = x.unflatten(axis, (count, -1))
        return x.movedim((-6, -4, -2), (-4, -3, -2)).flatten(-4, -2).flatten(-5, -3)
    if padding := order.visual_blocks * order.block - order.grid.visual:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (order.visual_blocks, order.block))


def from_blocks(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """[..., blocks, block, D] to [..., visual, D] in raster order, without padding slots."""
    if order.tile is None:
        return x.flatten(-3, -2)[..., : order.grid.visual, :]
    frames, rows, columns = order.grid.shape
    x = x.unflatten(-2, order.tile).unflatten(-5, order.tiles).movedim((-4, -3, -2), (-6, -4, -2))
    x = x.flatten(-7, -6).flatten(-5, -4).flatten(-3, -2)
    return x[..., :frames, :rows, :columns, :].flatten(-4, -2)


def block_means(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Mean of every block's tokens: [B, H, visual, D] to [B, H, blocks, D], fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if order.tile is not None:
        held = valid_tokens(order, x.device).to(wide)[:, None]
        return to_blocks(x, order).sum(-2, dtype=wide) / held
    whole = order.grid.visual // order.block
    runs = x[..., : whole * order.block, :].unflatten(-2, (whole, order.block)) if whole else x[..., :0, None, :]
    means = runs.mean(-2, dtype=wide)
    tail = x[..., whole * order.block :, :]
    return torch.cat([means, tail.mean(-2, keepdim=True, dtype=wide)], dim=-2) if tail.shape[-2] else means
