"""Peak signal-to-noise ratio against a baseline, in decibels."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from dit_accel.eval.metric import Metric, paired


def psnr(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """PSNR over all frames, colours and pixels together: 10 log10(1 / MSE), infinity for identical frames.

    Args:
        frames, baseline: float [F, C, H, W] in [0, 1], of one shape.
    """
    return float(peak_signal_noise_ratio(*paired("PSNR", frames, baseline), data_range=1.0))


METRIC = Metric(
    name="psnr",
    title="PSNR",
    unit="dB",
    better="higher",
    about="10 log10(1 / MSE) to the baseline of the same prompt and seed, over all 8-bit pixels; MSEs are averaged.",
    order=1,
    score=lambda sample, network: psnr(sample.frames, sample.baseline),
    decibels=True,
)
