"""Moving rows between a sample's [H, N, D] (or [H, N]) tensors and gathered problems [G, H, n, D] (or [G, H, n])."""

from __future__ import annotations

import torch


def gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [G, n] of x [H, N, D] or [H, N] as [G, H, n, D] or [G, H, n]."""
    groups, count = rows.shape
    if x.ndim == 3 and x.stride(0) == x.shape[2] and x.stride(2) == 1:  # heads lie side by side: one copy for all
        return (
            x.transpose(0, 1)
            .flatten(1)
            .index_select(0, rows.flatten())
            .view(groups, count, *x.shape[::2])
            .transpose(1, 2)
        )
    return x.index_select(1, rows.flatten()).unflatten(1, (groups, count)).transpose(0, 1)


def scatter(x: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write values [G, H, n, D] or [G, H, n] to rows [G, n] of x [H, N, D] or [H, N]; no row comes twice."""
    if x.ndim == 3:
        # x lies in memory as [N, H, D], and so do the fused kernel's results.
        x.transpose(0, 1).flatten(1).index_copy_(0, rows.flatten(), values.transpose(1, 2).flatten(0, 1).flatten(1))
    else:
        x.index_copy_(1, rows.flatten(), values.transpose(0, 1).flatten(1))


def accumulate(x: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Add values [G, H, n, D] to rows [G, n] of x [H, N, D], which lies in memory as [N, H, D], in a fixed order."""
    target = x.transpose(0, 1).flatten(1)
    added = values.transpose(1, 2).flatten(0, 1).flatten(1).to(x.dtype)
    add_rows(target, rows.flatten(), added)


def add_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Add values [n, C] to rows [n] of target [N, C]; rows may come more than once, and the order is fixed."""
    if target.device.type == "cpu":
        target.index_add_(0, rows, values)
    else:  # index_add_ is atomic elsewhere, in any order; an accumulating index_put_ sorts
        target.index_put_((rows,), values, accumulate=True)


def new_output(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a query that sees no key gets: output 0 [B, H, N, D], in memory [B, N, H, D], and LSE -inf [B, H, N]."""
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    return spread(q, q.dtype), q.new_full(q.shape[:3], float("-inf"), dtype=high)


def spread(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the shape of x [B, H, N, D], in memory [B, N, H, D]."""
    batch, heads, tokens, dim = x.shape
    return x.new_zeros(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
