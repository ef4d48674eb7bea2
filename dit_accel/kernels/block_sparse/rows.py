"""Moving rows between tensors [H, N, ...] and the batched problems [G, H, n, ...] of `dense`.

The tensors lie in memory as [N, H, ...], so that all heads of a row move at once.
"""

from __future__ import annotations

import torch

from dit_accel.kernels.block_sparse import dense

# Where index_add_ is not atomic, in any order.
ADDS_IN_ORDER = ("cpu",)


class Rows:
    """Rows of G problems, n each.

    Where the rows of every problem are consecutive, and the problems equally far apart, problems are views.

    Args:
        index: int64 [G, n].
    """

    def __init__(self, index: torch.Tensor) -> None:
        self.index, self.shape = index, index.shape
        first = index[:, 0]
        self.start, self.step = int(first[0]), int(first[1] - first[0]) if len(index) > 1 else 0
        groups, places = (torch.arange(size, device=index.device) for size in index.shape)
        expected = self.start + self.step * groups[:, None] + places
        self.consecutive = self.step >= 0 and torch.equal(index, expected)

    def __getitem__(self, groups: slice) -> Rows:
        """Some of the problems."""
        some = object.__new__(Rows)
        some.index, some.consecutive, some.step = self.index[groups], self.consecutive, self.step
        some.shape, some.start = some.index.shape, self.start + self.step * (groups.start or 0)
        return some

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        head, row, *rest = x.stride()
        shape, offset = (self.shape[0], len(x), self.shape[1], *x.shape[2:]), self.start * row
        return x.as_strided(shape, (self.step * row, head, row, *rest), x.storage_offset() + offset)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [H, N, ...] as [G, H, n, ...]."""
        if self.consecutive:
            return self._view(x)
        return x.transpose(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.shape).transpose(1, 2)

    def write(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """The inverse of `of`; no row may come twice."""
        if self.consecutive:
            self._view(x).copy_(values)
        else:
            target, values = _words(x.transpose(0, 1)), _words(values.transpose(1, 2).flatten(0, 1))
            target.index_copy_(0, self.index.flatten(), values)

    def add(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [G, H, n, ...] to their rows; a row may come more than once, and the order is fixed."""
        if self.consecutive:
            for group, part in enumerate(values):
                self[slice(group, group + 1)]._view(x)[0].add_(part)
            return
        target, values = x.transpose(0, 1), values.transpose(1, 2).flatten(0, 1).to(x.dtype)
        if x.device.type in ADDS_IN_ORDER:
            target.index_add_(0, self.index.flatten(), values)
        else:  # an accumulating index_put_ sorts
            target.index_put_((self.index.flatten(),), values, accumulate=True)


def _words(x: torch.Tensor) -> torch.Tensor:
    """x in words of 16 bytes, where it divides into them: PyTorch copies by words, half to three times as fast."""
    wide = (
        x.ndim == 3 and x.stride(2) == 1 and all(n * x.element_size() % 16 == 0 for n in (x.shape[2], *x.stride()[:2]))
    )
    return x.view(torch.complex128) if wide and x.storage_offset() * x.element_size() % 16 == 0 else x


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """x [H, N, ...], laid out as [N, H, ...]; no copy of what is."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def empty_output(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a query that sees no key gets: output 0 [B, H, N, D], in memory [B, N, H, D], and LSE -inf [B, H, N]."""
    return zeros_spread(q), q.new_full(q.shape[:3], float("-inf"), dtype=dense.accumulation(q.dtype))


def zeros_spread(x: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape of x [B, H, N, D], in memory [B, N, H, D]."""
    return torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
