"""SSIM."""

import pytest
import torch
from messages import names
from torchmetrics.image import StructuralSimilarityIndexMeasure

from dit_accel.eval.metrics.likeness import ssim


def test_identity_is_perfect():
    frames = torch.rand(3, 3, 16, 20)
    assert ssim(frames, frames) == pytest.approx(1, abs=1e-6)


def test_is_torchmetrics_own():
    torch.manual_seed(0)
    frames, reference = torch.rand(2, 4, 3, 16, 16)
    expected = float(StructuralSimilarityIndexMeasure(data_range=1.0)(frames, reference))
    assert ssim(frames, reference) == pytest.approx(expected)


def test_constant_frames_follow_the_formula():
    """Without structure only luminance is left: (2ab + c) / (a² + b² + c) with c = 0.01²."""
    a, b, c = 0.6, 0.3, 0.01**2
    value = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert value == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=5e-4)


def test_falls_with_noise():
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 32, 32)
    noise = torch.randn_like(reference)
    values = [ssim((reference + strength * noise).clamp(0, 1), reference) for strength in (0.02, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)


def test_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=names("shapes")):
        ssim(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 15))
