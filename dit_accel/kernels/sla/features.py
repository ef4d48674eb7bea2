"""Feature maps of the linear branch and their derivatives."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

FeatureMap = Literal["softmax", "elu", "relu"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)

# Added to the denominator of the linear branch, as published (thu-ml/SLA, sparse_linear_attention/core.py).
EPSILON = 1e-5


def apply_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x), never negative: softmax over the head dimension, ``elu(x) + 1``, or ``relu(x)``.

    Args:
        x: [..., D], fp32 or wider; no 1/sqrt(D) is applied, as published.
        feature_map: one of `FEATURE_MAPS`.
    """
    if feature_map == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if feature_map == "elu" else x.relu()


def pull_back(gradient: torch.Tensor, x: torch.Tensor, mapped: torch.Tensor, feature_map: str) -> torch.Tensor:
    """dL/dx from ``gradient = dL/dphi`` and ``mapped = phi(x)``; all [..., D]."""
    if feature_map == "softmax":
        return mapped * (gradient - (mapped * gradient).sum(-1, keepdim=True))
    if feature_map == "elu":
        return gradient * mapped.clamp(max=1.0)
    return gradient * (x > 0)
