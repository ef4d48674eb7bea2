import math

import pytest
import torch

from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.codec import SlopeCodec, slopes


def test_the_basis_is_orthonormal():
    basis = slopes().double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_shapes_and_the_causal_first_frame():
    codec = SlopeCodec()
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = codec.encode(video).latent_dist.sample()
    assert latents.shape == (2, 12, 5, 4, 6)
    assert codec.decode(latents, return_dict=False)[0].shape == video.shape
    alone = codec.encode(video[:, :, :1]).latent_dist.mode()
    torch.testing.assert_close(alone, latents[:, :, :1])


def test_what_a_block_can_hold_comes_back_exactly():
    codec = SlopeCodec()
    latents = codec.encode(torch.rand(1, 3, 5, 8, 8) - 0.5).latent_dist.mode()
    video = codec.decode(latents).sample
    torch.testing.assert_close(codec.encode(video).latent_dist.mode(), latents)


@pytest.mark.parametrize(("size", "floor"), [((64, 64), 34), ((128, 128), 37), ((192, 224), 39)])
def test_true_clips_survive_the_round_trip(size, floor):
    generator = torch.Generator().manual_seed(0)
    video = clips.render(clips.sample_scenes(24, generator), 17, *size, generator)
    codec = SlopeCodec()
    error = (codec.decode(codec.encode(video).latent_dist.mode()).sample - video).square().mean((1, 2, 3, 4))
    psnr = 10 * torch.log10(4 / error)
    assert psnr.mean() > floor


def test_latents_have_about_unit_scale():
    generator = torch.Generator().manual_seed(0)
    video = clips.render(clips.sample_scenes(64, generator), 17, 64, 64, generator)
    codec = SlopeCodec()
    mean = torch.tensor(codec.config.latents_mean).view(1, 12, 1, 1, 1)
    std = torch.tensor(codec.config.latents_std).view(1, 12, 1, 1, 1)
    latents = (codec.encode(video).latent_dist.mode() - mean) / std
    assert abs(math.log2(latents[:, ::4].std())) < 0.5
    assert latents.std() < 1


def test_saved_and_loaded(tmp_path):
    SlopeCodec().save_pretrained(tmp_path)
    codec = SlopeCodec.from_pretrained(tmp_path)
    assert codec.config.scale_factor_spatial == 4
    assert torch.equal(codec.basis, slopes())


@pytest.mark.parametrize("shape", [(1, 3, 8, 16, 16), (1, 3, 9, 15, 16), (1, 4, 9, 16, 16)])
def test_what_cannot_be_encoded_is_refused(shape):
    with pytest.raises(ValueError, match="crop or pad"):
        SlopeCodec().encode(torch.zeros(shape))


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match=r"decodes \[B, 12, T, h, w\], got \(1, 16, 5, 4, 4\)"):
        SlopeCodec().decode(torch.zeros(1, 16, 5, 4, 4))
