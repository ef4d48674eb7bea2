"""Padded text that a model does not mask but weighs otherwise than the rest: attended apart, and merged by LSE."""

from __future__ import annotations

import torch


def from_its_end(x: torch.Tensor, text_start: torch.Tensor, text: int) -> torch.Tensor:
    """The text rows of keys or values, the last one first, so that padding is in front.

    Args:
        x: [B, H, N, D].
        text_start: int32 [B], first text row of each sample.
        text: text rows.

    Returns:
        [B, H, 1 + text, D]; the row in front is one that no list names, since the engine's grids are not empty.
    """
    rows = torch.arange(text, -1, -1, device=x.device).clamp(max=text - 1) + text_start[:, None]
    return x.take_along_dim(rows[:, None, :, None], 2)


def merge(
    out: torch.Tensor, lse: torch.Tensor, padding: torch.Tensor, padding_lse: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over two sets of keys, from the softmax over each.

    Args:
        out, padding: results over the two sets, [B, H, N, D].
        lse, padding_lse: their log-sum-exp, [B, H, N].
        bias: [B, N], what a query adds to the logits of the second set.

    Returns:
        Result and log-sum-exp over both, dtypes and layout as `out` and `lse`.
    """
    biased = padding_lse + bias[:, None].to(lse.dtype)
    empty = padding_lse == -torch.inf  # where the first set may be empty too
    share = (biased - lse).masked_fill(empty, -torch.inf).sigmoid()[..., None]
    merged = torch.lerp(out.to(lse.dtype), padding.to(lse.dtype), share).to(out.dtype)
    return merged, torch.where(empty, lse, torch.logaddexp(lse, biased.masked_fill(empty, 0.0)))
