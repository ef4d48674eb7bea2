"""Structural similarity to a baseline."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from dit_accel.eval.metric import Metric, paired


def ssim(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """SSIM of each frame with its baseline (Wang et al. 2004, gaussian window of 11 with sigma 1.5), averaged.

    It is at most 1, for identical frames.

    Args:
        frames, baseline: float [F, C, H, W] in [0, 1], of one shape, with sides of at least 11 pixels.
    """
    return float(structural_similarity_index_measure(*paired("SSIM", frames, baseline), data_range=1.0))


METRIC = Metric(
    name="ssim",
    title="SSIM",
    better="higher",
    about="Structural similarity to the baseline of the same prompt and seed, frame by frame (window 11, sigma 1.5).",
    order=2,
    score=lambda sample, network: ssim(sample.frames, sample.baseline),
)
