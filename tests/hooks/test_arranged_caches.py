"""Step caches beside tokens along a curve: what a cache keeps is in the model's order."""

import pytest
import torch
from arranged_stacks import BUILD, SOL, Gathers, call_of, of_steps, over_families, where
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig
from tiny_models import module, run

import dit_accel


@pytest.mark.parametrize("schedule", [{"dense_steps": 1}, {"dense_steps": 1, "dense_last_steps": 2}], ids=str)
@pytest.mark.parametrize("cache", ["first-block", "mag:threshold=0.05,mag_ratios=0.98"])
@over_families
def test_step_caches(family, cache, schedule, in_each_layer):
    """What they keep is in the model's order: dense steps may use what sparse ones left, and the other way."""
    threshold = 0.04 if family == "minimax_h3" else 0.02  # skips some steps and computes others
    cache = f"first-block:threshold={threshold}" if cache == "first-block" else cache
    check_cache(family, cache, schedule, in_each_layer)


@pytest.mark.parametrize("cache", ["taylorseer:cache_interval=2,disable_cache_before_step=2", "steps:computed=0x1x3"])
def test_further_step_caches(cache, in_each_layer):
    check_cache("wan", cache, {"dense_steps": 1, "dense_last_steps": 2}, in_each_layer)


def check_cache(family, cache, schedule, in_each_layer):
    transformer = BUILD[family]()
    ways = []

    def work():
        with dit_accel.accelerated(transformer, "sol", cache=cache, dense_layers=0, **schedule, **SOL) as accel:
            outputs = of_steps(family, accel, transformer)
            assert 0 < accel.report().cache.skipped < 6
            ways.append(where(accel))
        return outputs

    assert torch.equal(*in_each_layer(work))
    assert ways == [[{"layer"}, {"stack"}, {"stack"}, {"layer"}], [{"layer"}] * 4]


def test_a_listed_step_that_is_skipped_permutes_nothing():
    transformer = module("wan").build(layers=4)
    with dit_accel.accelerated(transformer, "sol", cache="steps:computed=0x1", **SOL) as accel:
        counts = []
        for step in range(3):
            accel.set_step(step, 3)
            with Gathers({315}) as gathers:
                run(transformer, call_of("wan", step))
            counts.append(len(gathers.shapes))
        assert counts[0] == counts[1] > counts[2] == 0


def test_a_cache_that_keeps_what_attention_returns(in_each_layer):
    """In dense steps it may return what a sparse step left, so both are in the model's order."""
    transformer, ways = BUILD["hunyuan_video"](), []
    cache = "taylorseer:cache_interval=2,disable_cache_before_step=2,use_lite_mode=false"

    def work():
        schedule = {"dense_steps": 1, "dense_last_steps": 2}
        with dit_accel.accelerated(transformer, "sol", cache=cache, **schedule, **SOL) as accel:
            outputs = of_steps("hunyuan_video", accel, transformer)
            ways.append(where(accel))
            assert accel.report().cache.skipped
        return outputs

    assert torch.equal(*in_each_layer(work)) and ways[0] == [{"layer"}] * 4


def test_a_cache_of_the_users():
    transformer = module("wan").build(layers=4)
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        transformer.enable_cache(FirstBlockCacheConfig(0.1))
        with transformer.cache_context("cond"):
            run(transformer, call_of("wan"))
        transformer.disable_cache()
        assert where(accel) == [{"layer"}] * 4
        run(transformer, call_of("wan"))
        assert where(accel) == [{"layer", "stack"}] * 4


@pytest.fixture
def wan_pipe():
    """Wan 2.2 with two transformers; guidance calls each twice a step."""
    models = {"transformer": module("wan").build(layers=3), "transformer_2": module("wan").build(layers=4)}
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.8, **models,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    text = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=80, width=112, num_frames=9,
        num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip


@pytest.mark.parametrize(
    ("cache", "place"),
    [
        (None, "stack"),
        ("mag:threshold=0.05,mag_ratios=0.98", "stack"),
        ("pab:spatial_attention_block_skip_range=2,spatial_attention_timestep_skip_range=-1x1001", "layer"),
    ],
)
def test_a_pipeline_with_two_transformers(cache, place, wan_pipe, in_each_layer):
    reports = []

    def work():
        with dit_accel.accelerated(wan_pipe, "sol", cache=cache, dense_steps=1, **SOL) as accel:
            frames = generate(wan_pipe)
            reports.append((accel.report(), where(accel)))
        return frames

    assert torch.equal(*in_each_layer(work))
    report, ways = reports[0]
    inner = [way for number, way in enumerate(ways) if cache is None or number in (1, 4, 5)]
    assert all(way == {place} for way in inner)
    notes = [note for note in report.notes if "permuted" in note]
    assert len(notes) == (1 if place == "layer" else 0)
    assert cache is None or report.cache.skipped
