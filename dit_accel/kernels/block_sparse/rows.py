"""Moving rows between a call's [B, H, N, D] tensors and gathered problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from dit_accel.kernels.block_sparse.dense import high_precision

# Where problems are computed one head and one group at a time, to stay in cache; elsewhere they come in batches.
ONE_BY_ONE = ("cpu",)


def one_by_one(x: torch.Tensor) -> bool:
    """Whether problems on the device of x are computed one at a time."""
    return x.device.type in ONE_BY_ONE


def gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n] of x [N, ...], or rows [G, n] of x [H, N, ...] as [H, G, n, ...]."""
    if rows.ndim == 1:
        return x.index_select(0, rows)
    return x.index_select(1, rows.flatten()).unflatten(1, rows.shape)


def write_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """The inverse of `gather`; no row comes twice."""
    if rows.ndim == 1:
        target.index_copy_(0, rows, values)
    else:
        target.index_copy_(1, rows.flatten(), values.flatten(1, 2))


def add_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Add gathered values to their rows; rows may come more than once, and the order is fixed."""
    if rows.ndim == 1:
        target, rows, values = target[None], rows[None], values[None, None]
    rows, values = rows.flatten(), values.flatten(1, 2)
    if one_by_one(target):
        target.index_add_(1, rows, values)
    else:  # index_add_ is atomic elsewhere, in any order; an accumulating index_put_ sorts
        target.transpose(0, 1).index_put_((rows,), values.transpose(0, 1), accumulate=True)


def parts(problems: torch.Tensor, dims: int = 2) -> Iterable[tuple]:
    """How to index the leading `dims` so that a CPU gets one problem at a time, and other devices all at once."""
    if one_by_one(problems):
        return itertools.product(*(range(size) for size in problems.shape[:dims]))
    return [(slice(None),) * dims]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """One sample [H, N, ...] of a call's input in high precision and contiguous; no copy if it is both."""
    return x.to(high_precision(x.dtype)).contiguous()


def empty_output(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a query that sees no key gets: output 0 [B, H, N, D], in memory [B, N, H, D], and LSE -inf [B, H, N]."""
    return zeros_spread(q), q.new_full(q.shape[:3], float("-inf"), dtype=high_precision(q.dtype))


def zeros_spread(x: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape of x [B, H, N, D], in memory [B, N, H, D]."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
