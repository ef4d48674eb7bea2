"""Space-filling curves: orders of a grid's tokens in which runs are compact in all three axes."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch

from dit_accel.plans.plan import building
from dit_accel.tokens import TokenGrid

Curve = Literal["morton", "hilbert"]
Shape = tuple[int, int, int]
Rows = tuple[torch.Tensor, torch.Tensor]
Vector = np.ndarray[Any, np.dtype[np.int64]]


@functools.lru_cache(maxsize=16)
def along(curve: Curve, shape: Shape) -> torch.Tensor:
    """The visual tokens of a grid (frames, height, width) along a curve: raster indices, int64 [visual].

    "morton": by the interleaved bits of row, column and frame. "hilbert": the generalised Hilbert curve, which takes
    one step at a time on any grid; where an axis is odd it may take a diagonal one.

    Source:
        G. M. Morton, A Computer Oriented Geodetic Data Base, 1966. J. Červený, "gilbert", a Hilbert curve of arbitrary
        cuboids (github.com/jakubcerveny/gilbert), whose division rules this follows.
    """
    frames, height, width = shape
    with building():
        if curve == "morton":
            axes = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, 3)
            code = torch.zeros(len(axes), dtype=torch.int64)
            for bit in range(max(shape).bit_length()):
                for place, axis in enumerate((2, 1, 0)):  # columns change fastest
                    code |= (axes[:, axis] >> bit & 1) << 3 * bit + place
            return code.argsort()
        sides = [np.array(side) for side in ((0, 0, width), (0, height, 0), (frames, 0, 0))]
        sides.sort(key=lambda side: -side.sum())  # the longest axis leads; stable: width before height before frames
        points = torch.from_numpy(_walk(sides[0], sides[1], sides[2], {}))
        return (points[:, 0] * height + points[:, 1]) * width + points[:, 2]


def rows_along(curve: Curve, grid: TokenGrid, device: torch.device) -> Rows:
    """A sequence with its visual tokens along a curve: the token at each place, and each token's place, int64 [tokens].

    Text and conditioning tokens stay where they are. Backward passes may save the rows, on every device.
    """
    with building():
        rows = torch.arange(grid.tokens)
        rows[grid.visual_rows] = grid.visual_start + along(curve, grid.shape)
        return rows.to(device), rows.argsort().to(device)


def _walk(a: Vector, b: Vector, c: Vector, known: dict[bytes, Vector]) -> Vector:
    """The cells of a box in order, from its corner along its sides a, b and c to the far end of a: int64 [cells, 3].

    A side is a vector along one axis; its length is the number of cells. Cells count from the corner. Boxes of the same
    sides are walked once and then kept in `known`.
    """
    key = np.stack((a, b, c)).tobytes()
    if key not in known:
        pieces = _pieces(a, b, c)
        if pieces:
            walked = [_walk(*sides, known) + start for start, sides in pieces]
        else:
            side = max((a, b, c), key=_length)
            walked = [np.arange(_length(side))[:, None] * np.sign(side)]
        known[key] = np.concatenate(walked)
    return known[key]


def _pieces(a: Vector, b: Vector, c: Vector) -> list[tuple[Vector, tuple[Vector, Vector, Vector]]]:
    """Corners and sides of the boxes into which a box is cut, in order; none for a single row."""
    long, wide, deep = _length(a), _length(b), _length(c)
    if sorted((long, wide, deep))[1] == 1:
        return []
    start = np.zeros_like(a)
    half_a, half_b, half_c = (_half(side) for side in (a, b, c))
    rest_a, rest_b, rest_c = a - half_a, b - half_b, c - half_c
    end_a, end_c = a - np.sign(a), c - np.sign(c)  # from a side's first cell to its last
    last_b, last_c = half_b - np.sign(b), half_c - np.sign(c)
    if 2 * long > 3 * wide and 2 * long > 3 * deep:  # two boxes, one behind the other
        return [(start, (half_a, b, c)), (half_a, (rest_a, b, c))]
    if 3 * wide > 4 * deep:  # out along b, across, and back: c stays whole
        return [
            (start, (half_b, c, half_a)),
            (half_b, (a, rest_b, c)),
            (end_a + last_b, (-half_b, c, -rest_a)),
        ]
    if 3 * deep > 4 * wide:  # the same with c for b
        return [
            (start, (half_c, half_a, b)),
            (half_c, (a, b, rest_c)),
            (end_a + last_c, (-half_c, -rest_a, b)),
        ]
    return [
        (start, (half_b, half_c, half_a)),
        (half_b, (c, half_a, rest_b)),
        (last_b + end_c, (a, -half_b, -rest_c)),
        (end_a + half_b + end_c, (-c, -rest_a, rest_b)),
        (end_a + last_b, (-half_b, half_c, -rest_a)),
    ]


def _length(side: Vector) -> int:
    return int(abs(side.sum()))


def _half(side: Vector) -> Vector:
    """Half of a side, rounded down; to an even number if the side is longer than two."""
    length = _length(side) // 2
    if length % 2 and _length(side) > 2:
        length += 1
    return length * np.sign(side)
