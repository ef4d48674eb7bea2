"""What `accelerate` takes: modular pipelines and any object with a transformer, besides pipelines and transformers."""

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import FluxAutoBlocks
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


def test_an_object_without_a_transformer(tiny):
    with pytest.raises(dit_accel.DitAccelError, match="object has no diffusion transformer"):
        dit_accel.accelerate(object(), "gna", window=1)
