"""Runs of four steps, as distilled models have them: what stays dense, ramps, caches, and what is said."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from messages import names
from tiny_models import get, run

import dit_accel
from dit_accel.errors import DitAccelWarning
from dit_accel.schedule import Schedule

MODELS = {
    "wan:t2v": ("sol", {"tau": "1.5..0.5", "block": 8, "block_q": 8}),
    "hunyuan_video:t2v": ("sparge", {"topk": "0.2..0.4", "topp": 0.0, "block_q": 16, "block": 16}),
    "cogvideox:1.0": ("sol", {"tau": "1.5..0.5", "block": 8, "block_q": 8}),
    "flux:t2i": ("gna", {"window": "1x5x4..1x3x3"}),
    "qwen_image:t2i": ("sla", {"topk": "0.3..0.5", "block": 16}),
}


class Distilled:
    """A pipeline of a transformer and a scheduler of so many steps."""

    def __init__(self, transformer, steps=4):
        self.transformer, self.scheduler = transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)

    def __call__(self, inputs):
        outputs = []
        for timestep in self.scheduler.timesteps:
            outputs.append(run(self.transformer, inputs))
            self.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        return outputs


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_four_is_dense_and_a_ramp_covers_the_rest(name):
    """A share of 0.2, as presets have it; each sparse step has the bits of its own settings."""
    method, settings = MODELS[name]
    tiny = get(*name.split(":"))
    transformer, inputs = tiny.build(), tiny.call()
    dense, seen = run(transformer, inputs), {}
    pipe = Distilled(transformer)
    with dit_accel.accelerated(pipe, method, dense_steps=0.2, **settings) as accel:
        with accel.watch(lambda call: seen.setdefault(call.step.index, call.plan.config)):
            outputs = pipe(inputs)
        report = accel.report()
    assert torch.equal(outputs[0], dense) and sorted(seen) == [1, 2, 3] and not report.notes
    assert {layer.dense_calls for layer in report.layers if layer.sparse_calls} == {1}
    for step, config in seen.items():
        with dit_accel.accelerated(transformer, method, **vars(config)):
            assert torch.equal(run(transformer, inputs), outputs[step])
    ramp = accel.setting.config
    assert (seen[1], seen[3]) == (ramp.first, ramp.last) and seen[2] not in (ramp.first, ramp.last)


@pytest.mark.parametrize(
    ("words", "steps", "named"),
    [
        ({"dense_steps": 0.1}, 4, "dense_steps=0.1 4 steps 1"),
        ({"dense_last_steps": 0.05}, 8, "dense_last_steps=0.05 8 steps 1"),
        ({"dense_steps": 0.2}, 2, "dense_steps=0.2 2 steps 1"),
        ({"dense_steps": 0.2, "dense_last_steps": 0.5}, 2, "dense_steps=0.2 dense_last_steps=0.5 2 steps"),
        ({"dense_steps": 4}, 4, "dense_steps=4 4 steps"),
    ],
)
def test_other_dense_steps_than_asked_for_are_said_once(words, steps, named, tiny_wan, wan_inputs):
    pipe, inputs = Distilled(tiny_wan(), steps), wan_inputs()
    with dit_accel.accelerated(pipe, "sol", block=16, block_q=16, **words) as accel:
        with pytest.warns(DitAccelWarning, match=names(named)) as said:
            pipe(inputs)
        report = accel.report()
    assert len(said) == 1
    assert [note for note in report.notes if "dense" in note] == [str(said[0].message).removesuffix(".")]


def test_shares_that_are_a_step_are_not_remarked():
    for steps in range(3, 60):
        assert Schedule(dense_steps=0.2, dense_last_steps=0).remark(steps) is None
    assert Schedule(dense_steps=1).remark(2) is None and Schedule().remark(1) is None
