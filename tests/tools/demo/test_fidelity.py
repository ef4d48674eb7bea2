import pytest
import torch

from dit_accel.pipelines.demo import clips
from tools.demo.evaluate import fixed_scenes
from tools.demo.fidelity import nearest_clip


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    words = clips.describe(fixed_scenes(8))
    paths = clips.sample_paths(words, 9, 48, 64, generator)
    return words, paths, clips.paint(words, paths, 9, 48, 64), generator


def test_the_clip_behind_noise_is_found(drawn):
    """Noise of 0.02 in [-1, 1] is 40 dB away from its clip, and the fit can only come nearer."""
    words, paths, video, generator = drawn
    psnr, nearest = nearest_clip(video + 0.02 * torch.randn(video.shape, generator=generator), words)
    assert (psnr > 39).all() and (psnr < 40.5).all()
    torch.testing.assert_close(nearest, paths, rtol=0, atol=0.25)


def test_another_shape_another_colour_and_a_jump_are_far_away(drawn):
    words, _, video, _ = drawn
    jump = torch.cat([video[:, :, :4], video[:, :, 4:].roll((6, 6), (3, 4))], dim=2)
    shape = words.clone()
    shape[:, 1] = (shape[:, 1] + 1) % 3
    colour = words.clone()
    colour[:, 0] = (colour[:, 0] + 1) % 6
    for spoiled, wanted in ((jump, words), (video, shape), (video, colour)):
        assert (nearest_clip(spoiled, wanted)[0] < 30).all()


def test_an_empty_frame_is_no_true_clip(drawn):
    words, _, video, _ = drawn
    assert (nearest_clip(video[:, :, :1, :1, :1].expand_as(video), words)[0] < 25).all()
