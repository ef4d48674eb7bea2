"""Tolerances for tests of kernels: derived from what plain PyTorch gets wrong, never tuned."""

from __future__ import annotations

import torch


def error_budget(plain: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None = None) -> float:
    """Largest error a kernel may make: twice that of plain PyTorch in the same dtype, plus one rounding.

    Args:
        plain: the result of plain PyTorch in the dtype under test.
        exact: the same in float64.
        magnitude: size of summed terms that cancel in the result; None: the result's own size. For dq and dk it is the
            sum of p * (abs(dp) + abs(delta)) times abs(k) or abs(q).

    Source: the rule of attention-gym (``attn_gym/testing/kda.py``) and of flash-attention's tests.
    """
    size = exact if magnitude is None else magnitude
    band = torch.finfo(plain.dtype).eps * _largest(size)
    return 2 * _largest(plain.double() - exact.double()) + band


def assert_accurate(
    name: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None = None
) -> None:
    """Check `got` against `exact` within `error_budget`."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(exact.shape)}"
    assert bool(got.isfinite().all()), f"{name}: not finite"
    error, budget = _largest(got.double() - exact.double()), error_budget(plain, exact, magnitude)
    assert error <= budget, f"{name}: error {error:.3e} above the budget of {budget:.3e}"


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked attention as one writes it in PyTorch, in the inputs' dtype: output [B, H, Nq, D] and LSE [B, H, Nq].

    `mask` is bool, broadcastable to [B, H, Nq, Nk]; rows without keys have output 0 and LSE -inf.
    """
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(~mask, 0.0)
    lse = torch.logsumexp(logits.masked_fill(blind, 0.0), -1).masked_fill(blind.squeeze(-1), float("-inf"))
    return weights @ v, lse


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
