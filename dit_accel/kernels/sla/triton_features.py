"""Feature maps of the linear branch and their derivatives, on tiles of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.features import EPSILON
from dit_accel.kernels.sla.triton_rows import load_columns

EPS = tl.constexpr(EPSILON)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scales_of_rows(
    x, rows, valid, width, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """What whole rows of one head say to their columns, for `mapped_columns`: two numbers a row, fp32 [ROWS]."""
    shift = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    size = tl.zeros([ROWS], dtype=tl.float32)
    if MAP == "softmax":
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            part = load_columns(x, rows, valid, first, float("-inf"), D, COLUMNS).to(tl.float32)
            shift = tl.maximum(shift, tl.max(part, 1))
        shift = tl.where(valid, shift, 0.0)
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            part = load_columns(x, rows, valid, first, float("-inf"), D, COLUMNS).to(tl.float32)
            size += tl.sum(tl.exp2(part * LOG2E - (shift * LOG2E)[:, None]), 1)
    return shift, tl.where(valid, size, 1.0)


@triton.jit
def mapped_columns(x, shift, size, inside, MAP: tl.constexpr):
    """phi of some columns of rows in fp32; 0 in columns not `inside`."""
    x = x.to(tl.float32)
    if MAP == "softmax":
        x = tl.where(inside, x, float("-inf"))
        x = tl.exp2(x * LOG2E - (shift * LOG2E)[:, None]) * (1.0 / size)[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        x = tl.where(inside, x, 0.0)
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def mapped(x, D: tl.constexpr, MAP: tl.constexpr):
    """phi of rows [ROWS, BLOCK_D] in fp32; 0 in columns beyond D."""
    x = x.to(tl.float32)
    inside = tl.arange(0, x.shape[1])[None, :] < D
    shift = tl.max(tl.where(inside, x, float("-inf")), 1)
    size = shift  # not read
    if MAP == "softmax":
        size = tl.sum(tl.where(inside, tl.exp2(x * LOG2E - (shift * LOG2E)[:, None]), 0.0), 1)
    return mapped_columns(x, shift, size, inside, MAP)


@triton.jit
def pulled_columns(gradient, x, phi, of_row, MAP: tl.constexpr):
    """dL/dx from dL/dphi of some columns; of_row: the sum of phi * dL/dphi over whole rows."""
    if MAP == "softmax":
        result = phi * (gradient - of_row[:, None])
    elif MAP == "elu":
        result = gradient * tl.minimum(phi, 1.0)
    else:
        result = tl.where(x > 0.0, gradient, 0.0)
    return result


@triton.jit
def pulled_back(gradient, x, phi, MAP: tl.constexpr):
    """dL/dx from dL/dphi, fp32 [ROWS, BLOCK_D]."""
    return pulled_columns(gradient, x, phi, tl.sum(phi * gradient, 1), MAP)
