"""Diffusers' caches, which skip blocks or attention: what runs is right, and the report counts what ran."""

import collections

import pytest
import torch
from accelerated_runs import each, plain_and_exact, train
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from masked_reference import assert_no_worse
from tiny_models import get, run

import dit_accel

# Where Diffusers 0.42.1 has the cache and its blocks registered; on FLUX.2 it fails.
CACHED = ("cogvideox:1.0", "flux:t2i", "hunyuan_image:refiner", "hunyuan_video:t2v", "ltx:t2v", "mochi:t2v")
CACHED += ("qwen_image:t2i", "wan:t2v")
CALLS = 4


def run_cached(transformer, tiny, accel, config):
    """Outputs of some calls under a cache, and how often each layer really computed sparse attention."""
    ran = collections.Counter()
    transformer.enable_cache(config)
    with accel.watch(lambda call: ran.update([call.layer])):
        outputs = []
        for _ in range(CALLS):
            with transformer.cache_context("cond"):
                outputs.append(run(transformer, tiny.call()))
    transformer.disable_cache()
    return outputs, ran


@pytest.mark.check("cache")
@each([get(*name.split(":")) for name in CACHED])
def test_first_block_cache(tiny, method, config, evidence):
    """With the same input every time the cached answer is the answer: all but the first block run once."""
    transformer = tiny.build()
    plain, exact = plain_and_exact(transformer, tiny, method, config)
    with dit_accel.accelerated(transformer, method, **config) as accel:
        train(accel)
        outputs, ran = run_cached(transformer, tiny, accel, FirstBlockCacheConfig(threshold=1e9))
        report = accel.report()
    evidence(report)
    for output in outputs:
        assert_no_worse(output, plain, exact)
    assert [layer.sparse_calls for layer in report.layers] == [CALLS] + [1] * (len(report.layers) - 1)
    assert {layer.name: layer.sparse_calls for layer in report.layers} == ran
    assert report.calls == {"transformer": CALLS}


@pytest.mark.parametrize(
    "cache",
    [
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        ),
        MagCacheConfig(threshold=9.0, retention_ratio=0.25, num_inference_steps=CALLS, mag_ratios=torch.ones(CALLS)),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, use_lite_mode=True),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_other_caches_are_counted(cache):
    tiny = get("wan", "t2v")
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)) as accel:
        _, ran = run_cached(transformer, tiny, accel, cache)
        report = accel.report()
    assert {layer.name: layer.sparse_calls for layer in report.layers} == ran
    assert 0 < sum(ran.values()) < CALLS * len(report.layers), "nothing was skipped"
