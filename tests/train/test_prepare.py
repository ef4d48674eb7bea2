"""Training data are what the pipeline itself uses: its conditioning, its latents, its codec's scale."""

import numpy as np
import pytest
import torch
from messages import names
from PIL import Image

from dit_accel import DitAccelError
from dit_accel.registry import get_families
from dit_accel.train import prepare
from dit_accel.train.networks import check_family
from dit_accel.train.prepare import Preparer

SIZE = {"num_frames": 5, "height": 32, "width": 48}


def test_conditioning_is_the_pipelines_own(tiny):
    pipe = tiny.load()
    call, shape = Preparer(pipe, SIZE).conditioning("a red circle moves up on a black background")
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(
            "a red circle moves up on a black background", do_classifier_free_guidance=False, max_sequence_length=512
        )
    assert torch.equal(call["encoder_hidden_states"], embeds) and shape == (1, 96, 3, 8, 12)
    assert not pipe.transformer._forward_pre_hooks


def test_generated_latents_decode_to_the_pipelines_video(tiny):
    pipe = tiny.load()
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0}
    samples = list(Preparer(pipe, SIZE).generated(["a red circle", "blue"], arguments, seed=5))
    wanted = pipe("blue", generator=torch.Generator().manual_seed(6), **arguments, **SIZE, output_type="latent").frames
    assert torch.equal(samples[1].latents, wanted) and samples[1].prompt == "blue"


def test_encoded_clips_are_on_the_scale_of_the_latents(tiny):
    """Un-normalised as the pipeline does and decoded, the latents give the clip that the codec gives of it."""
    pipe = tiny.load()
    ((video, caption),) = prepare.demo_clips(1, SIZE, seed=3)
    (sample,) = Preparer(pipe, SIZE).encoded(iter([(video, caption)]))
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    decoded = pipe.vae.decode(sample.latents * std + mean).sample
    assert torch.allclose(decoded, pipe.vae.decode(pipe.vae.encode(video[None]).latent_dist.mode()).sample, atol=1e-5)


def test_folder_of_captioned_pictures(tmp_path):
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red bar\n")
    ((video, caption),) = prepare.captioned(tmp_path, {"height": 20, "width": 16})
    assert caption == "a red bar" and video.shape == (3, 1, 20, 16)
    assert video[0].min() > 0.99 and video[1:].max() < -0.99, "the middle is red: scaled to 20 x 50, then cut to 16"


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DitAccelError, match=names("image")):
        list(prepare.captioned(tmp_path, {"height": 8, "width": 8}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DitAccelError, match=names("1 a.png a.txt")):
        list(prepare.captioned(tmp_path, {"height": 8, "width": 8}))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DitAccelError, match=names("1 5")):
        list(prepare.captioned(tmp_path, {"height": 8, "width": 8, "num_frames": 5}))


def test_pipelines_that_cannot_be_trained(tiny):
    pipe = tiny.load()
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(DitAccelError, match=names("two")):
        Preparer(pipe, SIZE)
    with pytest.raises(DitAccelError, match=names("transformer")):
        prepare.find_transformer(object())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"hidden_states": torch.ones(2, 4), "timestep": torch.ones(2)},
            "hidden_states 2 4",
        ),
        ({"hidden_states": torch.ones(1, 4), "timestep": torch.ones(1, 4)}, "1 4"),
        ({"x": [torch.ones(4)], "t": torch.ones(1)}, "hidden_states ()"),
    ],
    ids=["rows", "tokens", "names"],
)
def test_calls_that_cannot_be_trained(call, message):
    class Model(torch.nn.Module):
        config = None

        def forward(self, hidden_states=None, timestep=None, x=None, t=None):
            raise AssertionError("the call is only looked at")

    class Pipe:
        transformer = Model()

        def set_progress_bar_config(self, **arguments):
            pass

        def __call__(self, **arguments):
            self.transformer(**call)

    with pytest.raises(DitAccelError, match=names(message)):
        Preparer(Pipe(), {}).conditioning("")


def test_pipelines_that_need_an_image_are_refused(wan_folder):
    from diffusers import WanImageToVideoPipeline, WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    needs_image = WanImageToVideoPipeline(**pipe.components)
    with pytest.raises(DitAccelError, match=names("WanImageToVideoPipeline image")):
        Preparer(needs_image, SIZE).conditioning("a red circle")
    assert not pipe.transformer._forward_pre_hooks


def test_levels_are_those_the_pipeline_samples_at(flux_folder):
    """FLUX's pipeline gives its scheduler even levels and a shift by length, unlike the scheduler's own."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    size = {"height": 32, "width": 48}
    levels = Preparer(pipe, size).levels(3, torch.Size((1, 96, 16)))
    pipe("", num_inference_steps=3, output_type="latent", **size)
    assert torch.equal(levels, pipe.scheduler.sigmas) and levels.shape == (4,) and levels[-1] == 0
    with pytest.raises(DitAccelError, match=names("16 FluxPipeline")):
        Preparer(pipe, size).levels(3, torch.Size((1, 6, 16)))


@pytest.mark.parametrize(("family", "word"), [("mochi", "timestep"), ("z_image", "timestep"), ("ltx2", "sound")])
def test_families_that_cannot_be_trained(family, word):
    with pytest.raises(DitAccelError, match=names(f"{family} {word}")):
        check_family(get_families()[family])
