"""What a plan is asked: everything of an attention call besides q, k and v, and what decides on who computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dit_accel.kernels.block_sparse.api import Impl


class Asked(NamedTuple):
    """How to attend; fields as the arguments of `plans.Plan.attend`."""

    scale: float | None = None
    text_lens: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None
    impl: Impl = "auto"
    module: nn.Module | None = None


class Kind(NamedTuple):
    """What kind of call it is; fields as the arguments of `plans.Plan.choose_impl`."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    impl: Impl = "auto"
    learned: bool = False
