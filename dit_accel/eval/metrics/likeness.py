"""Likeness to a baseline, pixel by pixel. Frames and baselines are float [F, C, H, W] in [0, 1], of one shape."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dit_accel.eval.metric import Metric, paired


def psnr(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """PSNR over all frames, colours and pixels together: 10 log10(1 / MSE), infinity for identical frames."""
    return float(peak_signal_noise_ratio(*paired("PSNR", frames, baseline), data_range=1.0))


def ssim(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """SSIM of each frame with its baseline (Wang et al. 2004, gaussian window of 11 with sigma 1.5), averaged.

    It is at most 1, for identical frames. Their sides have at least 11 pixels.
    """
    return float(structural_similarity_index_measure(*paired("SSIM", frames, baseline), data_range=1.0))


def temporal_psnr(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """PSNR between x[t+1] - x[t] of the frames and of the baseline, with the frames' own peak of 1.

    A constant error of all frames, such as a shift in brightness, does not count; flicker counts twice. F is 2 or more.
    """
    if len(frames) < 2:
        raise ValueError(f"Temporal PSNR compares neighbouring frames and needs 2 of them, got {len(frames)}.")
    return psnr(frames.float().diff(dim=0), baseline.float().diff(dim=0))


METRICS = (
    Metric(
        name="psnr",
        title="PSNR",
        unit="dB",
        better="higher",
        about="10 log10(1 / MSE) to the baseline of the same prompt and seed, over all 8-bit pixels; "
        "MSEs are averaged.",
        order=1,
        score=lambda sample, network: psnr(sample.frames, sample.baseline),
        decibels=True,
    ),
    Metric(
        name="ssim",
        title="SSIM",
        better="higher",
        about="Structural similarity to the baseline of the same prompt and seed, frame by frame "
        "(window 11, sigma 1.5).",
        order=2,
        score=lambda sample, network: ssim(sample.frames, sample.baseline),
    ),
    Metric(
        name="temporal_psnr",
        title="Temporal PSNR",
        unit="dB",
        better="higher",
        about="PSNR of the differences between neighbouring frames, with the frames' peak of 1; MSEs are averaged.",
        order=3,
        score=lambda sample, network: temporal_psnr(sample.frames, sample.baseline),
        video=True,
        decibels=True,
    ),
)
