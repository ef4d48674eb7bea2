"""Diffusers' caches, which skip blocks or attention: what runs is right, and the report counts what ran."""

import collections
import copy

import pytest
import torch
from accelerated_runs import each_run, plain_and_exact, settings, train
from diffusers import hooks
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from masked_reference import MaskedAttention, assert_no_worse, static_pairs
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
@each_run([get(*name.split(":")) for name in CACHED])
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


# Each cache once more on a model of its own, where no threshold is near: with the same decisions whatever is computed.
RANGES = {"spatial_attention_timestep_skip_range": (-1, 1001), "current_timestep_callback": lambda: 500}
FASTER = RANGES | {"unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": (-1, 1001)}
MAG = {"threshold": 9.0, "retention_ratio": 0.25, "num_inference_steps": CALLS, "mag_ratios": torch.ones(CALLS)}
OTHERS = [
    ("wan:t2v", PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **RANGES)),
    ("wan:t2v", MagCacheConfig(**MAG)),
    (
        "wan:t2v",
        TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
        ),
    ),
    ("wan:t2v", FasterCacheConfig(**FASTER)),
    # Of a batch with texts of different length, FasterCache runs the second half.
    ("mochi:t2v", FasterCacheConfig(**FASTER)),
    ("wan:t2v", SeaCacheConfig(threshold=1e9)),
    ("nucleus_image:t2i", TextKVCacheConfig()),
]


def run_steps(transformer, tiny, cache, dtype):
    """Outputs of some calls that differ under a cache."""
    outputs = []
    transformer.enable_cache(cache)
    for step in range(CALLS):
        call = tiny.call(dtype=dtype)
        call["hidden_states"] = call["hidden_states"] * (1 + step / CALLS)
        with transformer.cache_context("cond", step_index=step, sigma=1 - step / CALLS, num_inference_steps=CALLS):
            outputs.append(run(transformer, call))
    transformer.disable_cache()
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("name", "cache"), OTHERS, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_every_cache_skips_what_it_would_and_the_rest_is_right(name, cache):
    """Against the same cache around masked attention; what is counted is what ran."""
    tiny = get(*name.split(":"))
    transformer = tiny.build()
    method, config = settings(tiny)[0]
    ran = collections.Counter()
    with dit_accel.accelerated(transformer, method, **config) as accel:
        with accel.watch(lambda call: ran.update([call.layer])):
            sparse = run_steps(transformer, tiny, copy.copy(cache), torch.float32)
        report = accel.report()
    assert {layer.name: layer.sparse_calls for layer in report.layers if layer.sparse_calls} == ran
    assert report.dense_calls == 0 and report.calls == {"transformer": CALLS}
    # TextKVCache keeps keys and values of the text, and skips no attention.
    assert (0 < sum(ran.values()) < CALLS * len(report.layers)) != isinstance(cache, TextKVCacheConfig)
    pairs = static_pairs(dit_accel.plan(method, tiny.grid, **config).token_mask())
    with MaskedAttention(tiny, pairs):
        plain = run_steps(tiny.build(), tiny, copy.copy(cache), torch.float32)
    with MaskedAttention(tiny, pairs, double=True):
        exact = run_steps(tiny.build().double(), tiny, copy.copy(cache), torch.float64)
    assert_no_worse(sparse, plain, exact)
    assert (sparse - run_steps(tiny.build(), tiny, copy.copy(cache), torch.float32)).abs().max() > 100 * (
        sparse - plain
    ).abs().max()


def test_these_are_all_caches():
    known = {"FirstBlockCacheConfig", *(type(cache).__name__ for _, cache in OTHERS)}
    assert known == {name for name in dir(hooks) if name.endswith(("CacheConfig", "BroadcastConfig"))}
