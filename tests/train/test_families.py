"""Pipelines of several families make training data, and train on it."""

import copy
import inspect

import pytest
import torch

from dit_accel.checkpoint import lora
from dit_accel.pipelines.targets import find_transformers
from dit_accel.train import data, prepare
from dit_accel.train.card import Base
from dit_accel.train.loop import train
from dit_accel.train.prepare import Preparer
from dit_accel.train.settings import make

HEIGHT, WIDTH = 32, 64
TEXT = torch.zeros(1, 3, 16)
CODEC = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CODEC |= {"block_out_channels": (8, 8), "norm_num_groups": 2, "layers_per_block": 1}
LAYERS = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1}


def flux():
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    sizes = {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    vae = AutoencoderKL(**CODEC, latent_channels=4, shift_factor=0.3, scaling_factor=2.0)
    transformer = FluxTransformer2DModel(**LAYERS, **sizes, axes_dims_rope=(4, 4, 8))
    return FluxPipeline, vae, transformer, (TEXT, torch.zeros(1, 16), torch.zeros(3, 3))


def flux2():
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    sizes = {"in_channels": 8, "num_single_layers": 1, "joint_attention_dim": 16, "timestep_guidance_channels": 16}
    vae = AutoencoderKLFlux2(**CODEC, latent_channels=2)
    vae.bn.running_mean += torch.linspace(-1, 1, 8)
    vae.bn.running_var *= 3
    transformer = Flux2Transformer2DModel(**LAYERS, **sizes, axes_dims_rope=(4, 4, 4, 4))
    return Flux2KleinPipeline, vae, transformer, (TEXT, torch.zeros(1, 3, 4))


def ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    strides, wide = (True, True, False, False), (8,) * 4
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, patch_size=2, block_out_channels=wide, decoder_block_out_channels=wide,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, decoder_inject_noise=(False,) * 5,
        spatio_temporal_scaling=strides, decoder_spatio_temporal_scaling=strides,
    )  # fmt: skip
    vae.latents_mean += torch.linspace(-1, 1, 4)
    vae.latents_std *= 3
    sizes = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 16}
    mask = torch.ones(1, 3, dtype=torch.int64)
    return LTXPipeline, vae, LTXVideoTransformer3DModel(**LAYERS, **sizes), (TEXT, mask, None, None)


def qwen_image():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-1.0, 0.0, 0.5, 1.0], latents_std=[0.5, 1.0, 2.0, 3.0],
    )  # fmt: skip
    sizes = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
    return QwenImagePipeline, vae, QwenImageTransformer2DModel(**LAYERS, **sizes), (TEXT, None)


@pytest.fixture(params=[flux, flux2, ltx, qwen_image], ids=lambda build: build.__name__)
def pipe(request, monkeypatch):
    """A pipeline in random weights, which takes every prompt for the same embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    kind, vae, transformer, text = request.param()
    monkeypatch.setattr(kind, "encode_prompt", lambda self, *args, **kwargs: copy.deepcopy(text))
    absent = [name for name in inspect.signature(kind).parameters if name.startswith(("text_encoder", "tokenizer"))]
    parts = {"vae": vae.eval(), "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return kind(**parts, **dict.fromkeys(absent))


@pytest.fixture
def size(pipe):
    video = {"num_frames": 5} if "num_frames" in inspect.signature(type(pipe).__call__).parameters else {}
    return video | {"height": HEIGHT, "width": WIDTH}


@torch.no_grad()
def test_the_pipeline_decodes_encoded_latents_to_the_clip(pipe, size):
    """At a velocity of zero a pipeline only decodes: its codec, scale and packing undo those of `encode`."""
    for weight in pipe.transformer.proj_out.parameters():
        weight.zero_()
    frames = size.get("num_frames", 1)
    video = torch.rand(1, 3, frames, HEIGHT, WIDTH) * 2 - 1
    _, shape = Preparer(pipe, size).conditioning("a red circle")
    encoded = prepare.encode(pipe, video, shape)
    assert encoded.shape == shape
    if type(pipe).__name__ == "Flux2KleinPipeline":  # it takes latents that are not packed
        encoded = encoded.transpose(1, 2).unflatten(2, (HEIGHT // 4, WIDTH // 4))
    plain = {"guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "pt"}
    decoded = pipe(prompt="a red circle", latents=encoded, **plain, **size)[0]
    images = not any(isinstance(layer, torch.nn.Conv3d) for layer in pipe.vae.modules())
    seen = pipe.vae.encode(video[:, :, 0] if images else video).latent_dist.mode()
    codec = pipe.vae.decode(seen, return_dict=False)[0].reshape(3, frames, HEIGHT, WIDTH).transpose(0, 1)
    wanted = (codec / 2 + 0.5).clamp(0, 1).reshape(decoded.shape)
    assert wanted.std() > 0.01 and torch.allclose(decoded, wanted, atol=1e-5)


def test_generated_samples_are_what_the_transformer_would_take_next(pipe, size):
    (sample,) = Preparer(pipe, size).generated(["a red circle"], {"num_inference_steps": 2, "guidance_scale": 1.0}, 3)
    _, shape = Preparer(pipe, size).conditioning("a red circle")
    assert sample.latents.shape == shape and sample.latents.std() > 0.1 and "step" not in vars(pipe.scheduler)


def test_it_trains(pipe, size, tmp_path):
    """Every layer of self-attention is adapted, and a step moves the adapters."""
    preparer = Preparer(pipe, size)
    clips = [(torch.rand(3, size.get("num_frames", 1), HEIGHT, WIDTH) * 2 - 1, "a red circle") for _ in range(2)]
    data.write(tmp_path / "data", preparer.encoded(iter(clips)), preparer.conditioning("")[0], size)
    settings = make({"method": "gna", "config": {"window": 1}, "steps": 2, "rank": 2, "batch": 2, "rate": 1e-2})
    folder = train(pipe, settings, tmp_path / "data", tmp_path / "run", base=Base("tiny"))
    moved = [name for name, weight in pipe.transformer.named_parameters() if "lora_B" in name and weight.any()]
    transformer, family = find_transformers(pipe)[0]["transformer"]
    for layer, _ in family.attentions(transformer):
        assert any(name.startswith(f"{layer}.") for name in moved), f"{layer} was not adapted"
    assert (folder / lora.LORA_FILE).is_file() and (folder / "accelerator.json").is_file()
