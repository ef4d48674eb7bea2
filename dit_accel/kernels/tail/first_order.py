"""PISA's first-order term of the tail, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.cuts import block_means, to_blocks
from dit_accel.order import TokenOrder


def correction(q: Tensor, k: Tensor, v: Tensor, key_order: TokenOrder, scale: float) -> Tensor:
    """What the first-order term adds to a row of pure tail: [B, H, visual, D], fp32 or fp64. Differentiable.

    To first order, a block's sum of exp(logit) * value has the further term ``scale * p * q (K - mean)^T V``. PISA puts
    one matrix for all blocks in place of each block's own: its mean over the tokens. So a tail of mass g adds
    ``scale * g * q H / N``. With the tail normalised by its mass, g cancels.

    Source: PISA (arXiv 2602.01077); xie-lab-ml/piecewise-sparse-attention.

    Args:
        q, k, v: visual tokens [B, H, visual, D].
        key_order: how they are cut; of a grid of visual tokens alone.
        scale: of the logits.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # a padding slot has a value of 0
    centred = to_blocks(k.to(wide), key_order) - block_means(k, key_order)[..., None, :]
    matrix = centred.to(k.dtype).flatten(-3, -2).mT @ to_blocks(v, key_order).flatten(-3, -2)
    return q.to(wide) @ (matrix.to(wide) * (scale / key_order.grid.visual))
