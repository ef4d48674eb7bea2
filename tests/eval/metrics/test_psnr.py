"""PSNR."""

import math

import pytest
import torch
from messages import names
from torchmetrics.image import PeakSignalNoiseRatio

from dit_accel.eval.metrics.likeness import psnr


def test_identity_is_perfect():
    frames = torch.rand(3, 3, 16, 20)
    assert psnr(frames, frames) == math.inf


def test_known_value():
    """An error of 1/10 everywhere is 20 dB."""
    assert psnr(torch.full((2, 3, 8, 8), 0.6), torch.full((2, 3, 8, 8), 0.5)) == pytest.approx(20, abs=1e-4)


def test_is_torchmetrics_own():
    torch.manual_seed(0)
    frames, reference = torch.rand(2, 4, 3, 16, 16)
    assert psnr(frames, reference) == pytest.approx(float(PeakSignalNoiseRatio(data_range=1.0)(frames, reference)))


def test_averages_the_error_not_the_decibels():
    """A perfect frame beside a bad one does not make the clip perfect."""
    reference = torch.zeros(2, 3, 8, 8)
    frames = reference.clone()
    frames[1] = 0.1
    assert psnr(frames, reference) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=names("shapes")):
        psnr(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
