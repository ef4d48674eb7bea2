"""Step caches beside skip-layer guidance: in some calls of a transformer one of its blocks does not run."""

import pytest
import torch
from tiny_models import get, run

import dit_accel

STEPS = 4
CACHES = (
    "first-block:threshold=0",
    "mag:threshold=0",
    "mag:calibrate=true",
    "steps:computed=0x1x2x3",
    "first-block:threshold=1e9",
    "mag:threshold=9,mag_ratios=1.0,retention_ratio=0",
    "steps:computed=0x1",
)


@pytest.mark.parametrize("skipped", [0, 1, -1])
@pytest.mark.parametrize("cache", CACHES)
def test_a_block_may_not_run(cache, skipped):
    """Two calls a step, the second without one block: a cache that skips nothing changes no bit.

    Without the first or the last block there is nothing to reuse, and every such call computes.
    """
    tiny = get("sd3", "t2i")
    transformer = tiny.build()
    layers = len(transformer.transformer_blocks)
    calls = []
    for step in range(STEPS):
        call = tiny.call()
        call["hidden_states"] = call["hidden_states"] * (1 + step / 20)
        calls += [(step, call), (step, call | {"skip_layers": [skipped % layers]})]
    dense = [run(transformer, call) for _, call in calls]
    with dit_accel.accelerated(transformer, "dense", cache=cache) as accel:
        outputs = []
        for step, call in calls:
            accel.set_step(step, STEPS)
            outputs.append(run(transformer, call))
        plain, guided = accel.report().cache.branches
    if cache in CACHES[:4]:
        assert all(map(torch.equal, outputs, dense))
        assert (plain.computed, plain.skipped) == (guided.computed, guided.skipped) == (STEPS, 0)
        assert set(guided.steps.values()) == {1}
        return
    assert not all(map(torch.equal, outputs[::2], dense[::2]))
    assert all(map(torch.equal, outputs[1::2], dense[1::2])) == (skipped != 1)
    assert plain.skipped > 0 and guided.skipped == (plain.skipped if skipped == 1 else 0)


@pytest.mark.parametrize("cache", ["first-block:threshold=0", "taylorseer:disable_cache_before_step=9"])
def test_a_layer_with_another_processor_is_not_skipped(cache):
    tiny = get("wan", "t2v")
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "dense", cache=cache) as accel:
        attention = transformer.blocks[1].attn1
        attention.set_processor(type(attention.processor.inner)())
        for step in range(STEPS):
            accel.set_step(step, STEPS)
            call = tiny.call()
            run(transformer, call | {"hidden_states": call["hidden_states"] * (1 + step / 20)})
        (branch,) = accel.report().cache.branches
    assert (branch.computed, branch.skipped) == (STEPS, 0)
