"""What every implementation of sparse-linear attention is told besides q, k, v and the router's lists."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from dit_accel.kernels.sla.features import FeatureMap
from dit_accel.order import TokenOrder

LinearScope = Literal["all", "marginal"]
LINEAR_SCOPES: tuple[str, ...] = get_args(LinearScope)


class Setting(NamedTuple):
    """See `dit_accel.kernels.sla.api.sparse_linear_attention` for what is not said here.

    order: the sequence and its blocks.
    text_len, text_bias: int32 [B] and [B, N] on the device of q, or None.
    """

    order: TokenOrder
    text_len: torch.Tensor | None
    text_bias: torch.Tensor | None
    scale: float
    feature_map: FeatureMap
    linear_scope: LinearScope
    weight: torch.Tensor | None
    bias: torch.Tensor | None
