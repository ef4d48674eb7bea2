"""Structural similarity: whether the same structures are at the same places."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from dit_accel.eval.metrics.metric import Kind


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """SSIM of each frame with its reference (Wang et al. 2004, gaussian window of 11 with sigma 1.5), averaged.

    Args:
        frames, reference: float [F, C, H, W] with values in [0, 1], of the same shape, sides of at least 11 pixels.

    Returns:
        At most 1, which identical frames reach.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"SSIM compares equal shapes, got {tuple(frames.shape)} and {tuple(reference.shape)}.")
    return float(structural_similarity_index_measure(frames.float(), reference.float(), data_range=1.0))


METRIC = Kind(
    name="ssim",
    title="SSIM",
    unit="",
    better="higher",
    about="Structural similarity to the reference of the same prompt and seed, frame by frame (window 11, sigma 1.5).",
    score=lambda item, network: ssim(item.frames, item.reference),
)
