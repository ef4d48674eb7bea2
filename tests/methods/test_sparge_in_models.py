"""sparge in a transformer: lists kept for some steps, budgets of heads, and settings of layers."""

import dataclasses

import pytest
import torch
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods import sparge
from dit_accel.pipelines.demo import load_demo
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid

SMALL = {"topk": 0.3, "topp": 0.2, "block_q": 16, "block": 16}


@pytest.fixture
def routed(monkeypatch):
    """Counts how often a call is routed."""
    calls = []
    route = sparge.route
    monkeypatch.setattr(sparge, "route", lambda *args, **more: calls.append(1) or route(*args, **more))
    return calls


def test_lists_are_kept_for_some_steps_and_each_guidance_branch(tiny_wan, wan_inputs, routed):
    """Two layers. Steps 0, 1, 2, 4, then a new run; two calls a step with different inputs."""
    model, inputs = tiny_wan(), [wan_inputs(3, 6, 8, batch=1) for _ in range(2)]
    inputs[1] = {**inputs[1], "hidden_states": inputs[1]["hidden_states"].flip(-1)}
    layers = len(model.blocks)
    with dit_accel.accelerated(model, "sparge", **SMALL, refresh=2) as accel, torch.no_grad():
        routings, outputs = [], {}
        for step in (0, 1, 2, 4, 0):
            accel.set_step(step, 6)
            for branch in (0, 1):
                routed.clear()
                outputs[len(routings)] = model(**inputs[branch], return_dict=False)[0]
                routings.append(len(routed))
    assert routings == [n * layers for n in (1, 1, 0, 0, 1, 1, 1, 1, 1, 1)]
    # the same inputs in both steps: kept lists are those of the first, of each branch
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    with dit_accel.accelerated(model, "sparge", **SMALL), torch.no_grad():
        assert all(torch.equal(outputs[i], model(**inputs[i], return_dict=False)[0]) for i in (0, 1))


def test_kept_lists_are_those_of_the_earlier_step(tiny_wan, wan_inputs):
    """Other queries at the next step: the blocks stay."""
    model, inputs = tiny_wan(), wan_inputs(3, 6, 8, batch=1)
    seen = []
    with dit_accel.accelerated(model, "sparge", **SMALL, refresh=3) as accel, torch.no_grad():
        for layer in accel._engines[0].layers:
            layer.ours.density_sum = torch.zeros(2)
        for step in (0, 1):
            accel.set_step(step, 3)
            model(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 - 2 * step)}, return_dict=False)
            seen.append(
                [stored.bits.clone() for layer in accel._engines[0].layers for stored in layer.ours.stored.values()]
            )
        densities = [layer.step_density for layer in accel.report().layers]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(by_step[0] == pytest.approx(by_step[1]) for by_step in densities)


def test_refresh_needs_the_step(tiny_wan, wan_inputs):
    model, inputs = tiny_wan(), wan_inputs(3, 6, 8, batch=1)
    compiled = torch.compile(model, backend="eager")
    with (
        dit_accel.accelerated(model, "sparge", **SMALL, refresh=2),
        pytest.raises(DitAccelError, match=r"refresh .* set_step"),
    ):
        compiled(**inputs)


def test_budgets_are_numbers_of_blocks_for_each_head():
    grid = TokenGrid(2, 8, 16)
    plan = dit_accel.plan("sparge", grid, **{**SMALL, "topp": 0.0}, budgets=(0.25, 0.5, 0.07))
    q, k = torch.randn(2, 2, 3, grid.tokens, 8)
    counts = plan.route(q, k).counts
    assert (counts == torch.tensor([4, 8, 2])[:, None]).all()  # of 16, rounded up
    assert (plan.route(q[:, 1:], k[:, 1:], heads=(1, 3)).counts == torch.tensor([8, 2])[:, None]).all()
    assert plan.pairs == 256 * 8 * 16
    together = dit_accel.plan("sparge", grid, **SMALL, budgets=(0.25, 0.5, 0.07)).route(q, k)
    assert (together.counts >= counts).all()
    with pytest.raises(DitAccelError, match=names("budgets", 3, 2)):
        plan.route(q[:, :2], k[:, :2])


@pytest.mark.parametrize("budgets", [(), (0.5, 0.0), (0.5, 1.5), "budgets.json", 0.5])
def test_budgets_are_checked(budgets):
    with pytest.raises(DitAccelError, match=names("budgets", "'equal'")):
        sparge.Config(budgets=budgets)


@pytest.fixture
def calibrated(tmp_path):
    """Makes a file with budgets of all heads, for layers with these shares; None is dense."""

    def make(*shares, heads=2, **settings):
        shared = {**SMALL, "topp": 0.0, "block": 4, **settings}
        layers = [None if share is None else {"budgets": [share, 0.5][:heads], **shared} for share in shares]
        record = {"method": "sparge", "layers": {"transformer": layers}, "schedule": {"dense_steps": 1}}
        path = tmp_path / "budgets.json"
        path.write_text(Setting.from_dict(record).to_json())
        return path

    return make


@pytest.mark.parametrize("option", ["budgets", "layer_schedule"])
def test_a_file_gives_each_layer_and_head_its_budget(option, calibrated, tiny_wan, wan_inputs, tmp_path):
    """Of 36 tokens in 9 blocks, rounded up; what is given besides wins over the file, dense layers too."""
    model, inputs, path = tiny_wan(4), wan_inputs(3, 6, 8, batch=1), calibrated(0.2, 0.9, None, 0.3)
    by_budgets = option == "budgets"
    setting = (
        {"method": "sparge", "budgets": path, "tail": "mean", "dense_layers": (3,)} if by_budgets else {option: path}
    )
    calls = []

    def run(accel):
        accel.set_step(1, 3)  # the file's one dense step is over
        return model(**inputs, return_dict=False)[0]

    with dit_accel.accelerate(model, **setting) as accel, torch.no_grad(), accel.watch(calls.append):
        accel.save_pretrained(tmp_path / "saved")
        wanted, schedule = run(accel), accel.setting.schedule
    counts = [call.plan.route(call.q, call.k).counts.unique(dim=-1)[0, :, 0].tolist() for call in calls]
    assert counts == ([[2, 5], [9, 5]] if by_budgets else [[2, 5], [9, 5], [3, 5]])
    assert {call.plan.config.tail for call in calls} == {"mean" if by_budgets else "none"}
    assert schedule.dense_steps == 1 and [layer.dense_calls for layer in accel.report().layers] == [
        0, 0, 1, int(by_budgets),
    ]  # fmt: skip
    with dit_accel.load(model, tmp_path / "saved") as accel, torch.no_grad():
        assert torch.equal(run(accel), wanted) and accel.setting.schedule == schedule


def test_files_without_these_budgets_are_refused(calibrated, tiny_wan, wan_inputs, tmp_path):
    def refused(message, path, method="sparge"):
        with pytest.raises(DitAccelError, match=names(message)):
            dit_accel.accelerate(tiny_wan(), method, budgets=path)

    refused("3 2 transformer", calibrated(0.2, 0.9, 0.3))
    refused("budgets.json sparge without budgets", calibrated(0.2, 0.2, budgets="equal"))
    refused("budgets gna sparge", calibrated(0.2, 0.9), "gna")
    refused("none.json", tmp_path / "none.json")
    model = tiny_wan()
    with dit_accel.accelerated(model, "sparge", budgets=calibrated(0.2, 0.9, heads=1)) as accel:
        accel.set_step(1, 3)
        with pytest.raises(DitAccelError, match=names("budgets", 1, 2)):
            model(**wan_inputs(3, 6, 8, batch=1))


def test_cells_find_more_of_the_mass_than_means():
    """On the embedded model, as SubBlock's authors report: means below four cells below the best blocks."""
    calls, settings = [], {"topk": 0.2, "topp": 0.0, "block_q": 16, "block": 16}
    pipe = load_demo()
    with dit_accel.accelerated(pipe, "sparge", **settings) as accel, accel.watch(calls.append):
        pipe(
            "a red circle moving right", num_frames=9, height=96, width=96, num_inference_steps=1, output_type="latent"
        )
    masses = []
    for call in calls:
        plans = [dit_accel.plan("sparge", call.plan.grid, **settings, score=score) for score in ("mean", "subblock")]
        mass = [dataclasses.replace(call, plan=plan).measure(10**6).mass.mean() for plan in plans]
        weights = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1)  # 5 x 12 x 12 tokens: 45 whole blocks
        blocks = weights.unflatten(-1, (45, 16)).sum(-1).unflatten(-2, (45, 16)).mean(-2)
        masses.append(torch.stack([*mass, blocks.topk(9).values.sum(-1).mean()]))
    means, cells, best = torch.stack(masses).mean(0)
    assert means < cells < best
