"""Structural similarity: whether the same structures are at the same places."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from dit_accel.eval.metric import Metric


def ssim(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """SSIM of each frame with its baseline (Wang et al. 2004, gaussian window of 11 with sigma 1.5), averaged.

    Args:
        frames, baseline: float [F, C, H, W] with values in [0, 1], of the same shape, sides of at least 11 pixels.

    Returns:
        At most 1, which identical frames reach.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != baseline.shape:
        raise ValueError(f"SSIM compares equal shapes, got {tuple(frames.shape)} and {tuple(baseline.shape)}.")
    return float(structural_similarity_index_measure(frames.float(), baseline.float(), data_range=1.0))


METRIC = Metric(
    name="ssim",
    title="SSIM",
    unit="",
    better="higher",
    about="Structural similarity to the baseline of the same prompt and seed, frame by frame (window 11, sigma 1.5).",
    order=2,
    score=lambda sample, network: ssim(sample.frames, sample.baseline),
)
