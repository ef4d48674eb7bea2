"""What `accelerate` takes: modular pipelines and any object with a transformer, besides pipelines and transformers."""

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler, WanPipeline
from diffusers.modular_pipelines import FluxAutoBlocks
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from messages import names
from tiny_models import run

import dit_accel


@pytest.fixture
def tiny():
    return tiny_models.get("flux", "t2i")


def test_a_modular_pipeline_and_its_scheduler(tiny):
    transformer, scheduler = tiny.build(), FlowMatchEulerDiscreteScheduler()
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=scheduler)
    scheduler.set_timesteps(4)
    with dit_accel.accelerated(pipe, "gna", window=(1, 5, 4), dense_steps=1) as accel:
        for timestep in scheduler.timesteps[:3]:
            run(transformer, tiny.call() | {"timestep": timestep.expand(2) / 1000})
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        assert list(accel.transformers) == ["transformer"]
        assert {(layer.dense_calls, layer.sparse_calls) for layer in accel.report().layers} == {(1, 2)}
    assert torch.equal(run(transformer, tiny.call()), tiny.dense)


def test_any_object_with_transformers(tiny):
    class Host:
        def __init__(self):
            self.transformer, self.transformer_2, self.vae = tiny.build(), tiny.build(), None

    host = Host()
    with dit_accel.accelerated(host, "gna", window=(1, 5, 4)) as accel:
        run(host.transformer_2, tiny.call())
        assert accel.report().calls == {"transformer": 0, "transformer_2": 1}


@pytest.mark.parametrize("target", [object(), WanPipeline], ids=["object", "a pipeline's class"])
def test_an_object_without_a_transformer(target):
    with pytest.raises(dit_accel.DitAccelError, match=names("object transformer")):
        dit_accel.accelerate(target, "gna", window=1)


def test_minimax_h3_in_its_own_denoising_loop():
    """Diffusers' blocks make layout and noise; 5 seconds of 2 x 3 tokens a frame, with the sound before the video."""
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=tiny_models.module("minimax_h3").build(audio_in_channels=32, in_channels=24),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    text = {"prompt_embeds": tiny_models.numbers()(1, 7, 16), "text_token_tags": torch.ones(7, dtype=torch.long)}

    def latents():
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        state = pipe(**text, height=64, width=96, num_frames=124, num_inference_steps=5, generator=generator)
        return torch.cat([state.latents.flatten(), state.audio_latents.flatten()])

    dense = latents()
    with dit_accel.accelerated(pipe, "dense"):
        assert torch.equal(latents(), dense)
    with dit_accel.accelerated(pipe, "gna", window=(9, 2, 3), dense_steps=1) as accel:
        sparse, report = latents(), accel.report()
    assert list(report.grids) == ["37x2x3 + 421 text first"]
    assert {(layer.dense_calls, layer.sparse_calls) for layer in report.layers} == {(1, 3)}
    assert sparse.isfinite().all() and (sparse - dense).abs().max() > 1e-3
    with dit_accel.accelerated(pipe, "gna", window="full"):
        torch.testing.assert_close(latents(), dense, rtol=1e-3, atol=1e-3)
    assert torch.equal(latents(), dense)
