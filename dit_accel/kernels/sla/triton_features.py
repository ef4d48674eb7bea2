"""Feature maps of the linear branch and their derivatives, on tiles of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.sla.features import EPSILON

EPS = tl.constexpr(EPSILON)


@triton.jit
def mapped(x, D: tl.constexpr, MAP: tl.constexpr):
    """phi of rows [ROWS, BLOCK_D] in fp32; 0 in columns beyond D."""
    x = x.to(tl.float32)
    inside = tl.arange(0, x.shape[1])[None, :] < D
    if MAP == "softmax":
        x = tl.where(inside, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        x = tl.where(inside, x, 0.0)
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def pulled_back(gradient, x, phi, MAP: tl.constexpr):
    """dL/dx from dL/dphi, fp32 [ROWS, BLOCK_D]."""
    if MAP == "softmax":
        result = phi * (gradient - tl.sum(phi * gradient, 1)[:, None])
    elif MAP == "elu":
        result = gradient * tl.minimum(phi, 1.0)
    else:
        result = tl.where(x > 0.0, gradient, 0.0)
    return result
