"""The packed tables as the portable implementation reads them: pairs are decided for small sets of tokens at a time."""

from __future__ import annotations

import dataclasses

import torch

from dit_accel.kernels.block_sparse.geometry import Shape

_KIND_BAND = 1
_HEADER_WORDS = 8


@dataclasses.dataclass(frozen=True)
class _Axis:
    start: torch.Tensor  # int32 [length]
    stop: torch.Tensor
    step: int

    def refine(self, allowed: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
        """Clear the pairs of `allowed` [G, nq, nk] that this axis forbids; q, k: int32 coordinates [G, nq], [G, nk]."""
        start, stop, key = self.start[q][:, :, None], self.stop[q][:, :, None], k[:, None, :]
        if start.amax() > key.amin():
            allowed &= key >= start
        if stop.amin() <= key.amax():
            allowed &= key < stop
        if self.step > 1:
            allowed &= (key - start) % self.step == 0


class Predicate:
    """Decides visual pairs from the packed tables (format: `reference.allowed_pairs`).

    Args:
        tables: int32 [words].
        query_grid, grid: the visual grids of queries and keys.
    """

    def __init__(self, tables: torch.Tensor, query_grid: Shape, grid: Shape) -> None:
        self.query_grid, self.grid = query_grid, grid
        self.terms: list[tuple[_Axis, ...] | torch.Tensor] = []
        for header in tables[1 : 1 + _HEADER_WORDS * int(tables[0])].reshape(-1, _HEADER_WORDS).tolist():
            kind, offsets, steps = header[0], header[1:4], header[4:7]
            if kind == _KIND_BAND:
                frames = query_grid[0], grid[0]
                self.terms.append(tables[offsets[0] :][: frames[0] * frames[1]].reshape(frames))
                continue
            axes = []
            for offset, step, length in zip(offsets, steps, query_grid, strict=True):
                table = tables[offset : offset + 2 * length].reshape(length, 2)
                axes.append(_Axis(table[:, 0].contiguous(), table[:, 1].contiguous(), step))
            self.terms.append(tuple(axes))

    def allowed(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Which pairs of visual tokens are allowed: bool [G, nq, nk] for int64 raster indices q [G, nq], k [G, nk]."""
        q_axes, k_axes = _coordinates(q, self.query_grid), _coordinates(k, self.grid)
        union = None
        for term in self.terms:
            if isinstance(term, torch.Tensor):
                place_q = (q % (self.query_grid[1] * self.query_grid[2])).int()
                place_k = (k % (self.grid[1] * self.grid[2])).int()
                radius = term[q_axes[0][:, :, None], k_axes[0][:, None, :]]
                allowed = (place_q[:, :, None] - place_k[:, None, :]).abs_() < radius
            else:
                allowed = torch.ones(*q.shape, k.shape[1], dtype=torch.bool, device=q.device)
                for axis, q_axis, k_axis in zip(term, q_axes, k_axes, strict=True):
                    axis.refine(allowed, q_axis, k_axis)
            union = allowed if union is None else union.logical_or_(allowed)
        if union is None:
            return torch.zeros(*q.shape, k.shape[1], dtype=torch.bool, device=q.device)
        return union


def _coordinates(index: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, height, width = shape
    frame, place = index // (height * width), index % (height * width)
    return frame.int(), (place // width).int(), (place % width).int()
