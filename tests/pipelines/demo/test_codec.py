import pytest
import torch
from messages import names

from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.codec import BlockCodec


def test_shapes_and_the_causal_first_frame():
    codec = BlockCodec()
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = codec.encode(video).latent_dist.sample()
    assert latents.shape == (2, 96, 5, 4, 6)
    assert torch.equal(codec.decode(latents, return_dict=False)[0], video)
    alone = codec.encode(video[:, :, :1]).latent_dist.mode()
    assert torch.equal(alone, latents[:, :, :1])


def test_a_latent_position_holds_its_block_alone():
    video = torch.zeros(1, 3, 5, 8, 12)
    video[:, 1, 3, 5, 9] = 1.0  # the third block in time, the second down, the third across
    latents = BlockCodec().encode(video).latent_dist.mode()
    assert latents.nonzero()[:, 2:].tolist() == [[2, 1, 2]]


def test_true_clips_survive_the_round_trip_and_have_about_unit_scale():
    generator = torch.Generator().manual_seed(0)
    video = clips.render(clips.sample_scenes(64, generator), 9, 64, 64, generator)
    codec = BlockCodec()
    latents = codec.encode(video).latent_dist.mode()
    assert torch.equal(codec.decode(latents).sample, video)
    assert 0.5 < latents.square().mean().sqrt() < 1


def test_saved_and_loaded(tmp_path):
    BlockCodec().save_pretrained(tmp_path)
    codec = BlockCodec.from_pretrained(tmp_path)
    assert codec.config.scale_factor_spatial == 4
    assert codec.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 8, 16, 16), (1, 3, 9, 15, 16), (1, 4, 9, 16, 16)])
def test_what_cannot_be_encoded_is_refused(shape):
    with pytest.raises(ValueError, match=names("BlockCodec")):
        BlockCodec().encode(torch.zeros(shape))


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match=names("96 16 5 4")):
        BlockCodec().decode(torch.zeros(1, 16, 5, 4, 4))
