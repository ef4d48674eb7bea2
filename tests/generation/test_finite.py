"""Where values that are NaN or infinite come from."""

import functools

import pytest
import torch
from messages import says

from dit_accel.errors import DitAccelError
from dit_accel.generation import sampling
from dit_accel.generation.finite import find_place
from dit_accel.pipelines.demo import load_demo

SMALL = {"prompt": "a red circle", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3}


@pytest.fixture
def pipe(demo):
    return load_demo(folder=demo)


def refused(pipe, **arguments):
    with pytest.raises(DitAccelError) as error:
        sampling.sample(pipe, {**SMALL, **arguments}, 0, "", torch.device("cpu"))
    return str(error.value)


def test_guidance_that_overflows(pipe):
    said = refused(pipe, guidance_scale=float("inf"))
    assert "first in step 0, the latents after guidance and scheduler. Lower --guidance" in said
    assert says(refused(pipe, guidance_scale=1e38), "transformer.blocks.0.norm1")  # a norm squares


def test_a_layer_and_its_step(pipe):
    """The second block's query projection, from the second step on: guidance calls the model twice a step."""
    calls = []

    def broken(module, arguments, output):
        calls.append(module)
        return output * torch.nan if len(calls) % 6 > 2 or len(calls) % 6 == 0 else output

    hook = pipe.transformer.blocks[1].attn1.to_q.register_forward_hook(broken)
    assert says(refused(pipe), "transformer.blocks.1.attn1.to_q")
    assert len(pipe.transformer.blocks[1].attn1.to_q._forward_hooks) == 1  # the search has removed its own
    hook.remove()


def test_the_decoder(pipe, monkeypatch):
    decode = type(pipe.vae).decode

    @functools.wraps(decode)
    def broken(self, latents, *rest, **options):
        return (decode(self, latents, *rest, **options)[0] * torch.nan,)

    monkeypatch.setattr(type(pipe.vae), "decode", broken)
    assert "first in the decoding of the latents" in refused(pipe)


def test_nothing_to_find(pipe):
    """The words for a place outside all modules and latents."""
    assert find_place(pipe, lambda **more: None) == "the decoding of the latents"
