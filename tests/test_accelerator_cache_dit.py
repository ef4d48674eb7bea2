"""cache-dit around accelerated attention, where it is installed: what runs is counted, and removal is exact."""

import collections

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import dit_accel

cache_dit = pytest.importorskip("cache_dit")
STEPS, WINDOW = 8, {"window": (3, 5, 4)}


def generate(pipe):
    text = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=80, width=112, num_frames=9,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize("first", ["cache-dit", "ours"])
def test_both_orders(first, tiny_wan):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=tiny_wan(layers=4))
    pipe.set_progress_bar_config(disable=True)
    dense, ran = generate(pipe), collections.Counter()

    def enable():
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=9.0,
            enable_separate_cfg=True,
        )  # fmt: skip
        cache_dit.enable_cache(pipe, cache_config=config)

    if first == "cache-dit":
        enable()
    with dit_accel.accelerated(pipe, "gna", dense_steps=1, **WINDOW) as accel:
        if first == "ours":
            enable()
        with accel.watch(lambda call: ran.update([call.layer])):
            generate(pipe)
        report = accel.report()
        if first == "ours":
            cache_dit.disable_cache(pipe)
    if first == "cache-dit":
        cache_dit.disable_cache(pipe)
    first_layer, *others = report.layers
    assert (first_layer.sparse_calls, first_layer.dense_calls) == (2 * (STEPS - 1), 2)
    assert all(0 < layer.sparse_calls < 2 * (STEPS - 1) and layer.dense_calls == 2 for layer in others)
    assert {layer.name: layer.sparse_calls for layer in report.layers} == ran
    assert torch.equal(generate(pipe), dense)
