"""PSNR of the differences between neighbouring frames: the likeness of motion."""

from __future__ import annotations

import torch

from dit_accel.eval.metric import Metric
from dit_accel.eval.metrics.psnr import psnr


def temporal_psnr(frames: torch.Tensor, baseline: torch.Tensor) -> float:
    """PSNR between x[t+1] - x[t] of the frames and of the baseline, with the frames' own peak of 1.

    A constant error of all frames, such as a shift in brightness, does not count; flicker counts twice.

    Args:
        frames, baseline: float [F, C, H, W] in [0, 1], of one shape, F at least 2.
    """
    if len(frames) < 2:
        raise ValueError(f"Temporal PSNR compares neighbouring frames and needs 2 of them, got {len(frames)}.")
    return psnr(frames.float().diff(dim=0), baseline.float().diff(dim=0))


METRIC = Metric(
    name="temporal_psnr",
    title="Temporal PSNR",
    unit="dB",
    better="higher",
    about="PSNR of the differences between neighbouring frames, with the frames' peak of 1; MSEs are averaged.",
    order=3,
    score=lambda sample, network: temporal_psnr(sample.frames, sample.baseline),
    video=True,
    decibels=True,
)
