"""What every implementation of sparse-linear attention shares: a call's settings and the feature maps."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.geometry import empty_rows
from dit_accel.kernels.impls import AUTO
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

FeatureMap = Literal["softmax", "elu", "relu", "focused", "hedgehog"]
LinearScope = Literal["all", "marginal"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)
LINEAR_SCOPES: tuple[str, ...] = get_args(LinearScope)

# Added to the denominator of the linear branch, as published (thu-ml/SLA, sparse_linear_attention/core.py).
EPSILON = 1e-5


class SlaArguments(NamedTuple):
    """Arguments of a call besides q, k and v.

    weight, bias: projection of the linear branch, [D, D] and [D], cast to the dtype of q.
    query_order, key_order: how the sequence is cut into blocks of queries and blocks of keys; of one grid.
    topk: critical key blocks of every query block. 0: the exact branch covers conditioning and text alone; its output
        is 0 where there are none.
    scale: factor of the logits.
    skip: negligible key blocks of every query block in scope "marginal"; scope "all" has none.
    text_len: int [B], valid text tokens of each sample; text behind them is never a key. None: all of them.
    text_bias: floating point [B, N]: text behind `text_len` is a key after all, and each query adds its value to the
        logits of that text.
    feature_map: see `apply_map`.
    features: weight and bias of "hedgehog", [2, H or 1, D, D] and [2, H or 1, D]; None with every other map.
    impl: "auto", or the name of an implementation, which runs or raises.
    lists: critical and negligible blocks as `router.api.classify` returns them; None: by block means.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    query_order: TokenOrder
    key_order: TokenOrder
    topk: int
    scale: float
    skip: int = 0
    text_len: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None
    feature_map: FeatureMap = "softmax"
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    linear_scope: LinearScope = "all"
    impl: str = AUTO
    lists: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def grid(self) -> TokenGrid:
        return self.key_order.grid


def results(q: torch.Tensor, critical: torch.Tensor, linear_scope: str, training: bool) -> tuple[torch.Tensor, ...]:
    """Empty tensors for what `ops.attend` returns; those that are not needed have no elements."""

    def rows(wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        shape = q.shape[:3] if wanted else (0,)
        return empty_rows(q) if wanted else q.new_empty(0), q.new_empty(shape, dtype=torch.float32)

    marginal = training and linear_scope == "marginal"
    modes = critical.new_empty(critical.shape[:-1] if marginal else (0,))
    return empty_rows(q), *rows(training), *rows(marginal), modes


def learned_inputs(
    q: torch.Tensor, k: torch.Tensor, features: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the feature map takes of q and k [B, H, *, D]: ``x W^T + b``, fp32 or wider; without features q and k.

    Args:
        features: W [2, H or 1, D, D] and b [2, H or 1, D], for queries and for keys; see `apply_map`.
    """
    if features is None:
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    weight, bias = (x.to(wide) for x in features)
    queries, keys = (x.to(wide) @ w.mT + b[:, None] for x, w, b in zip((q, k), weight, bias, strict=True))
    return queries, keys


def apply_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x), never negative, [..., D], or [..., 2 D] of "hedgehog".

    "softmax" is over the head dimension. "elu" is ``elu(x) + 1``, "relu" ``relu(x)``.

    "focused": ``|r| r**3 / |r**3|`` with r = relu(x), which keeps the norm of r and turns it towards its largest
    values. Source: FLatten (arXiv 2308.00442), section 4.1, with its power of 3. Its learned scale of q and k, and the
    depthwise convolution of v beside the attention, are left out.

    "hedgehog": the softmax of x beside that of -x, where x is one of `learned_inputs`. Source: Hedgehog
    (arXiv 2402.04347), section 4. The paper writes exp(x) and exp(-x); its authors' later code (LoLCATs) divides each
    half by its sum, which no dtype overflows, and so does this.

    Args:
        x: [..., D], fp32 or wider. There is no factor 1/sqrt(D), as published.
        feature_map: one of `FEATURE_MAPS`.
    """
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    rectified = x.relu()
    if feature_map == "relu":
        return rectified
    # the map does not change with the cubes' size, so their peak is 1; a row of zeros stays 0
    peak = rectified.detach().amax(-1, keepdim=True)
    cubes = (rectified / torch.where(peak > 0, peak, 1)) ** 3
    return cubes * (_norm(rectified) / _norm(cubes).clamp(min=1))


def pull_back(gradient: torch.Tensor, x: torch.Tensor, mapped: torch.Tensor, feature_map: str) -> torch.Tensor:
    """dL/dx [..., D] from ``gradient = dL/dphi`` and ``mapped = phi(x)``."""
    if feature_map == "softmax":
        return mapped * (gradient - (mapped * gradient).sum(-1, keepdim=True))
    if feature_map == "elu":
        return gradient * mapped.clamp(max=1.0)
    if feature_map == "hedgehog":
        halves = zip(gradient.chunk(2, -1), mapped.chunk(2, -1), strict=True)
        of_x, of_negative = (pull_back(part, x, phi, "softmax") for part, phi in halves)
        return of_x - of_negative
    if feature_map == "relu":
        return gradient * (x > 0)
    # phi = |r| u with the unit vector u of r**3
    size, length = torch.where(x > 0, x, torch.inf), _norm(mapped)
    unit = mapped / torch.where(length > 0, length, 1)
    along = (gradient * unit).sum(-1, keepdim=True)
    turned = 3 * mapped / size * (gradient - along * unit)
    return turned + along * x.relu() / torch.where(length > 0, length, 1)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
