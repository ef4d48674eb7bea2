"""LPIPS's formula on the layers of any network."""

import pytest
import torch
from messages import names

from dit_accel.eval.metrics.perceptual import perceptual
from dit_accel.eval.networks import Clip
from dit_accel.pipelines.demo import clips
from tools.demo_clip.frames import blur, draw


class Colours:
    """Two layers: the colours themselves, and their mean over 2 x 2 pixels."""

    def layers(self, frames):
        return [frames, torch.nn.functional.avg_pool2d(frames, 2)]


def test_formula_by_hand():
    frames = torch.zeros(1, 3, 2, 2)
    reference = torch.zeros(1, 3, 2, 2)
    frames[:, 0], reference[:, 0] = 2.0, 3.0  # one colour at any strength is one direction
    assert perceptual(frames, reference, Colours()).tolist() == [0.0]
    reference[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])  # at right angles: 2 in one place of four
    pooled = torch.tensor([9.0, 1.0, 0.0]) / 82**0.5
    second = (1 - pooled[0]) ** 2 + pooled[1] ** 2
    assert perceptual(frames, reference, Colours()).item() == pytest.approx(2 / 4 + second.item())


def test_identity_is_zero_and_blur_counts():
    """On the embedded network: more blur is farther, frame by frame on average."""
    clip = Clip.load("demo-clip")
    generator = torch.Generator().manual_seed(0)
    frames = draw(list(clips.scenes(held_out=True))[::4], (128, 128), generator)
    assert perceptual(frames, frames, clip).tolist() == [0.0] * len(frames)
    distances = [perceptual(blur(frames, torch.full((len(frames),), s)), frames, clip).mean().item() for s in (1, 2, 4)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=names("shapes")):
        perceptual(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), Colours())
