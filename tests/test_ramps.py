"""Settings that change over the sparse steps: what a step runs, in models, pipelines, files and compiled graphs."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from messages import names
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.plans import ramps
from dit_accel.registry import make_config, settings_of
from dit_accel.schedule import Schedule, Step
from dit_accel.setting import Setting

RAMP = {"window": "5x7x7..1x3x3"}  # of a latent of 5x7x9 tokens
SMALLER = {"window": "3x5x5..1x3x3"}  # of the pipelines' 3x5x7


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def generate(pipe, steps):
    text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=text, height=80, width=112, num_frames=9, num_inference_steps=steps, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip


@pytest.fixture
def wan_pipe(tiny_wan):
    def make(**components):
        scheduler, parts = FlowMatchEulerDiscreteScheduler(shift=3.0), {"transformer": tiny_wan()} | components
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def by_step(accel, pipe, steps):
    """The Config of every sparse step of a run, by transformer and step."""
    seen = {}
    with accel.watch(lambda call: seen.setdefault((call.transformer, call.step.index), call.plan.config)):
        generate(pipe, steps)
    return seen


@pytest.mark.parametrize(
    ("method", "settings", "halfway"),
    [
        ("sol", {"tau": "1.3..0.8"}, {"tau": 1.05}),
        ("sol", {"tau": "2..1"}, {"tau": 1.5}),
        ("gna", {"window": "18x24x24..9x12x13"}, {"window": (14, 18, 19)}),
        ("gna", {"window": "5..2x2x2"}, {"window": (4, 4, 4)}),
        ("gna", {"window": "0.5..0.25"}, {"window": 0.375}),
        ("tile", {"references": "1..4"}, {"references": 3}),
        ("sparge", {"topk": "0.1..0.3", "topp": "0.2..0.0"}, {"topk": 0.2, "topp": 0.1}),
        ("rectified", {"drop": "0.9..0.7"}, {"drop": 0.8}),
        ("radial", {"decay": "0.4..0.2"}, {"decay": 0.3}),
    ],
)
def test_a_ramp_is_even_and_its_text_parses_back(method, settings, halfway):
    config = make_config(method, settings)
    assert config.at(0.5) == make_config(method, {**settings, **halfway})
    assert (config.at(0), config.at(1)) == ramps.ends(config) and config.at(0) != config.at(1)
    setting = Setting.make(method, settings, dense_steps=0.4)
    assert Setting.parse(setting.text) == setting and Setting.from_dict(json.loads(setting.to_json())) == setting
    assert make_config(method, settings_of(config)) == config


def test_a_ramp_between_equal_values_is_none():
    assert make_config("sol", {"tau": "1..1"}) == make_config("sol", {"tau": 1.0})


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("sol", {"block": "32..64"}, "block 32..64 tau"),
        ("heads", {"keep": "0..1"}, "keep 0..1"),
        ("gna", {"window": "8..0.5"}, "8..0.5"),
        ("gna", {"window": "full..3"}, "window full..3"),
        ("gna", {"window": "3x3..1x1x1"}, "window 3x3..1x1x1"),
        ("sparge", {"topk": "0.2..1.5"}, "topk 1.5"),
        ("sparge", {"score": "mean..error"}, "score mean..error"),
    ],
)
def test_what_is_no_ramp_is_refused(method, settings, named):
    with pytest.raises(DitAccelError, match=names(named)):
        make_config(method, settings)


def test_a_plan_and_training_are_of_one_value():
    with pytest.raises(DitAccelError, match=names("tau")):
        dit_accel.plan("sol", dit_accel.TokenGrid(2, 8, 8), tau="1.3..0.8")
    from dit_accel.train.settings import make

    with pytest.raises(DitAccelError, match=names("tau=1.3..0.8")):
        make({"method": "sol", "config": {"tau": "1.3..0.8"}})


def places(schedule, count, **more):
    return [round(schedule.place(Step(index, count), **more), 3) for index in range(count)]


def test_places_of_steps():
    assert places(Schedule(), 5) == [0, 0.25, 0.5, 0.75, 1]
    assert places(Schedule(dense_steps=2, dense_last_steps=1), 6) == [0, 0, 0, 0.5, 1, 1]
    assert places(Schedule(dense_steps=0.75), 4) == [0, 0, 0, 0]  # one sparse step
    assert places(Schedule(dense_steps=3, dense_last_steps=3), 4) == [0, 0, 0, 0]  # none
    assert places(Schedule(), 1) == [0]
    assert places(Schedule(dense_steps=1), 6, hold=2) == [0, 0, 0, 0.5, 0.5, 1]
    of_noise = [Schedule(dense_steps=0.25).place(Step(3, None, progress)) for progress in (0.0, 0.25, 0.625, 1.0)]
    assert of_noise == [0, 0, 0.5, 1]
    with pytest.raises(DitAccelError, match=names("refresh=3 set_step")):
        Schedule().place(Step(0, None, 0.5), hold=3)


def test_each_step_runs_its_own_settings(tiny_wan, wan_inputs):
    """Two dense steps around three sparse ones; each of those has the bits of an accelerator with its settings."""
    transformer, inputs = tiny_wan(), wan_inputs()
    windows, outputs = [(5, 7, 7), (3, 5, 5), (1, 3, 3)], []
    dense = run(transformer, inputs)
    with dit_accel.accelerated(transformer, "gna", dense_steps=1, dense_last_steps=1, **RAMP) as accel:
        for index in range(5):
            accel.set_step(index, 5)
            outputs.append(run(transformer, inputs))
        report = accel.report()
    assert torch.equal(outputs[0], dense) and torch.equal(outputs[4], dense)
    grid, wanted = dit_accel.TokenGrid(5, 7, 9), {}
    for index, window in enumerate(windows, 1):
        with dit_accel.accelerated(transformer, "gna", window=window):
            assert torch.equal(run(transformer, inputs), outputs[index])
        wanted[index] = dit_accel.plan("gna", grid, window=window).density
    assert all(layer.step_density == pytest.approx(wanted) for layer in report.layers)
    assert report.layers[0].density == pytest.approx(sum(wanted.values()) / 3)
    assert report.step_density == pytest.approx(wanted)
    assert "window=5x7x7..1x3x3" in str(report) and f"{wanted[3]:.4f} in step 3" in str(report)
    assert report.grids[str(grid)] == pytest.approx((wanted[1] + wanted[3]) / 2)


def test_plans_are_made_once_and_both_ends_before_the_first_step(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    accel = dit_accel.accelerate(transformer, "gna", dense_steps=1, **RAMP)
    plans = accel._plans
    make, built = plans._method.plan, []
    method = type("M", (), {"plan": lambda self, grid, config: built.append(config.window) or make(grid, config)})()
    object.__setattr__(plans, "_method", method)
    for index in (0, 1, 2, 3, 1, 2, 3):
        accel.set_step(index, 4)
        run(transformer, inputs)
        assert built[:2] == [(5, 7, 7), (1, 3, 3)]
    assert built == [(5, 7, 7), (1, 3, 3), (3, 5, 5)]
    accel.remove()
    accel = dit_accel.accelerate(transformer, "gna", window="1x3x3..9x9x9", dense_steps=1)
    accel.set_step(0, 4)
    with pytest.raises(DitAccelError, match=names("window 9")):  # does not fit the grid
        run(transformer, inputs)


def test_a_bare_transformer_follows_the_noise(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    seen = []
    with dit_accel.accelerated(transformer, "sol", tau="2..1", block=16, block_q=16) as accel:
        with accel.watch(lambda call: seen.append(call.plan.config.tau)):
            for value in (1000.0, 500.0, 0.0):
                run(transformer, inputs | {"timestep": torch.full_like(inputs["timestep"].float(), value)})
    assert seen == [2.0, 2.0, 1.5, 1.5, 1.0, 1.0]  # two layers


def test_steps_that_a_cache_skips_count(wan_pipe):
    """MagCache skips every other step; those that are computed have the settings of their place among all."""
    pipe = wan_pipe()
    cache = "mag:threshold=9,mag_ratios=1.0,retention_ratio=0,max_skip_steps=1"
    with dit_accel.accelerated(pipe, "sol", tau="2..1", block=16, block_q=16, dense_steps=1, cache=cache) as accel:
        taus = {step: config.tau for (_, step), config in by_step(accel, pipe, 6).items()}
        skipped = [index for index, row in accel.report().cache.branches[0].steps.items() if row == "skipped"]
    assert set(taus) < set(range(1, 6))
    assert taus == {step: round(2 - round((step - 1) / 4, 2), 6) for step in taus} and not set(taus) & set(skipped)


def test_two_transformers_share_one_ramp(wan_pipe, tiny_wan):
    pipe = wan_pipe(transformer_2=tiny_wan(), boundary_ratio=0.6)
    with dit_accel.accelerated(pipe, "gna", **SMALLER) as accel:
        seen = by_step(accel, pipe, 5)
    assert {name for name, _ in seen} == {"transformer", "transformer_2"}
    windows = [config.window for _, config in sorted(seen.items(), key=lambda pair: pair[0][1])]
    assert windows == [(3, 5, 5), (3, 5, 5), (2, 4, 4), (2, 4, 4), (1, 3, 3)]


def test_what_is_kept_for_some_steps_has_settings_for_as_many(wan_pipe):
    """`refresh` steps have one Config, so that results are shared; their first step is dense."""
    pipe = wan_pipe()
    with dit_accel.accelerated(pipe, "gna", share="residual", refresh=3, window="2x3x5..1x1x1") as accel:
        seen = {step: config.window for (_, step), config in by_step(accel, pipe, 7).items()}
        report = accel.report()
    assert seen == dict.fromkeys(range(3), (2, 3, 5)) | dict.fromkeys(range(3, 6), (2, 2, 3)) | {6: (1, 1, 1)}
    densities = report.layers[0].step_density
    assert [density > 1 for density in densities.values()] == [True, False, False] * 2 + [False]
    assert densities[6] == 1  # the last step keeps nothing


def test_layers_may_have_ramps(tiny_wan, wan_inputs, tmp_path):
    transformer, inputs = tiny_wan(3), wan_inputs()
    rows = {"transformer": [{"references": "1..3"}, None, {"references": 2}]}
    path = tmp_path / "layers.json"
    path.write_text(Setting.from_dict({"method": "tile", "layers": rows}).to_json())
    with dit_accel.accelerate(transformer, layer_schedule=path) as accel:
        for index in range(3):
            accel.set_step(index, 3)
            run(transformer, inputs)
        report = accel.report()
        accel.save_pretrained(tmp_path / "saved")
    grid = dit_accel.TokenGrid(5, 7, 9)
    densities = [dit_accel.plan("tile", grid, references=count).density for count in (1, 2, 3)]
    assert list(report.layers[0].step_density.values()) == pytest.approx(densities)
    assert report.layers[2].density == pytest.approx(densities[1])
    with dit_accel.load(transformer, tmp_path / "saved") as accel:
        assert accel.setting == Setting.read(path) and accel.setting.ramped


def test_a_ramp_makes_no_graph_of_its_own(tiny_wan, wan_inputs):
    """One graph for dense steps and one for sparse ones, whatever their settings."""
    transformer, inputs = tiny_wan(), wan_inputs()
    counter = CompileCounterWithBackend("aot_eager")
    with dit_accel.accelerated(transformer, "gna", dense_steps=1, **RAMP) as accel:
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        graphs = []
        for index in range(5):
            accel.set_step(index, 5)
            torch.testing.assert_close(run(compiled, inputs), run(transformer, inputs))
            graphs.append(counter.frame_count)
        assert graphs == [1, 2, 2, 2, 2]


def test_the_plan_verb_shows_both_ends(cli):
    outcome = cli("plan", "--method", "gna:window=3x8x8..1x4x4", "--grid", "4x16x16", "--json")
    facts = json.loads(outcome.out)
    assert facts["setting"] == "gna:window=3x8x8..1x4x4"
    for end, window in (("first_sparse_step", (3, 8, 8)), ("last_sparse_step", (1, 4, 4))):
        assert facts[end]["pairs"] == dit_accel.plan("gna", dit_accel.TokenGrid(4, 16, 16), window=window).pairs
    outcome = cli("plan", "--method", "sol:tau=1.3..0.8", "--grid", "4x16x16", "--image", "ramp.png")
    assert outcome.status == 2 and "tau" in outcome.err
