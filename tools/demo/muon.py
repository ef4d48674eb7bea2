"""Muon for many matrices at once: momentum, made orthogonal by five Newton-Schulz steps (Jordan et al., 2024).

`torch.optim.Muon` takes one matrix after another, some twenty small kernels each; here all matrices of one shape go
through together as a batch. The update is scaled to AdamW's size: 0.2 sqrt(max(rows, columns)) (Liu et al.,
arXiv:2502.16982, eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic of Jordan et al.
MOMENTUM = 0.95
DECAY = 0.01  # weight decay, decoupled


class BatchedMuon:
    """Muon with Nesterov momentum over matrices [rows, columns], grouped by shape.

    Args:
        matrices: parameters with gradients.
    """

    def __init__(self, matrices: Iterable[Tensor]):
        groups: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        self.groups = [(group, torch.zeros_like(torch.stack(group))) for group in groups.values()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all matrices at this learning rate, and drop their gradients."""
        for group, momentum in self.groups:
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM))
            scale = -rate * 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * DECAY)
            torch._foreach_add_(group, list(update.to(momentum.dtype).unbind()), alpha=scale)
            for matrix in group:
                matrix.grad = None


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: bfloat16 [..., rows, columns] with singular values near one."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
