"""Calibration: the recall that is recorded is that of the blocks the router lists, and the file is taken everywhere."""

import json

import pytest
import torch

import dit_accel
from dit_accel.eval import sweep
from dit_accel.eval.attention import record_attention
from dit_accel.generation.request import GenerateRequest
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.methods.sparge import METHOD, block_recall
from dit_accel.schedule import Schedule
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid
from dit_accel.train import search
from dit_accel.train.settings import TrainSettings
from dit_accel.tune.calibrate import reaching

SMALL = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 2)
BLOCKS = "sparge:block=4,block_q=8"


@pytest.mark.parametrize(
    "settings",
    [{}, {"score": "subblock", "cells": 4}, {"order": "hilbert"}, {"order": "tile"}],
    ids=lambda settings: str(settings.get("score") or settings.get("order")),
)
def test_the_recall_of_c_blocks_is_the_mass_that_a_budget_of_c_keeps(settings):
    """All queries sampled; ragged last blocks, text with padding, heads of different numbers."""
    grid = TokenGrid(3, 5, 6, text=7)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, grid.tokens, 8, generator=generator) for _ in range(3))
    settings = {"topp": 0.0, "block_q": 16, "block": 8, **settings}
    text = torch.tensor([7, 3])

    def call(**more):
        plan = dit_accel.plan("sparge", grid, **settings, **more)
        out = plan.attend(q, k, v, text_lens=text)
        return ComputedAttention("transformer", "layer", None, plan, q, k, v, out, text_lens=text)

    curve = block_recall(call(topk=1.0), torch.arange(grid.visual))
    blocks = curve.shape[1]
    assert blocks >= 12 and torch.allclose(curve[:, -1], torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert curve.diff(dim=1).min() > 0
    for counts in ((1, 4, blocks), (7, 2, blocks - 1)):
        mass = call(budgets=tuple((count - 0.5) / blocks for count in counts)).measure().mass.mean(0)
        expected = [curve[head, count - 1].item() for head, count in enumerate(counts)]
        assert mass.tolist() == pytest.approx(expected, rel=1e-5)  # the measure works in fp32


def test_every_head_keeps_the_fewest_blocks_that_reach_the_recall():
    curves = {
        "transformer": {
            "first": torch.tensor([[0.5, 0.8, 1.0], [0.9, 0.95, 1.0]]),
            "dense": None,
            "flat": torch.tensor([[0.3, 0.6, 1.0], [0.3, 0.6, 0.8999]]),
        }
    }
    settings = reaching(curves, 0.9, METHOD, {"block": 32}, Schedule(dense_steps=0.25))
    first, *others = settings.layers["transformer"]
    assert others == [None, None] and settings.schedule == Schedule(dense_steps=0.25)
    plan = dit_accel.plan("sparge", TokenGrid(3, 4, 8), block=32, topp=0.0, budgets=first.budgets)
    assert plan.budgets() == [3, 1] and first.block == 32
    (first, *_) = reaching(curves, 0.8, METHOD, {}, Schedule()).layers["transformer"]
    assert first.budgets == pytest.approx((1.5 / 3, 0.5 / 3))


def test_from_prompts_to_a_file_that_everything_takes(cli, demo, tmp_path, monkeypatch):
    from dit_accel.pipelines.demo import load_demo

    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue square\n")
    options = ("--method", BLOCKS, "--dense-steps", 1, "--prompts", prompts, "--output", out)
    outcome = cli("tune", *SMALL, "--calibrate", 0.9, *options)
    assert outcome.status == 0, outcome.err
    path = out / "budgets.json"
    content = json.loads(path.read_text())
    assert content["schedule"]["dense_steps"] == 1
    assert content["calibration"]["prompts"] == ["a red circle", "a blue square"]
    budgets = [layer["budgets"] for layer in content["layers"]["transformer"]]
    assert all(0 < share < 1 for shares in budgets for share in shares)

    pipe = load_demo(folder=demo)
    call = {"prompt": "a red circle", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    call |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    with dit_accel.accelerate(pipe, layer_schedule=path) as accel:
        record = record_attention(accel, lambda: pipe(**call))
        assert {step for _, step in record.mass} == {1} and accel.setting.layers["transformer"][0].block == 4
    # the first layer of the first sparse step sees what it saw in the calibration; its recall is a mean over two runs
    assert all(mass > 0.8 for mass in record.mass["transformer.blocks.0.attn1", 1])

    generated = cli("generate", *SMALL, "--load", path, "--output", tmp_path / "a.mp4")
    assert generated.status == 0, generated.err
    setting = json.loads((tmp_path / "a.json").read_text())["setting"]
    assert setting["schedule"]["dense_steps"] == 1 and setting["layers"] == content["layers"]
    typed = GenerateRequest(method=f"sparge:budgets={path}").candidate()
    assert json.loads(json.dumps(typed.record())) == setting and typed.title == f"sparge:budgets={path}"
    assert TrainSettings(method="sparge", config={"budgets": str(path)}).config["budgets"] == str(path)

    monkeypatch.setattr(sweep, "sample", None)  # nothing is run again
    before = path.read_bytes()
    assert cli("tune", *SMALL, "--calibrate", 0.9, *options).status == 0 and path.read_bytes() == before
    assert cli("tune", *SMALL, "--calibrate", 0.5, *options).status == 0
    fewer = [config.budgets for config in Setting.read(path).layers["transformer"]]
    assert all(sum(few) < sum(many) for few, many in zip(fewer, budgets, strict=True))


def test_heads_from_prompts_to_a_file(cli, tmp_path, monkeypatch):
    """At most the share of all heads is kept, the last in each layer's order; another share measures nothing again."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue square\n")
    options = ("--method", "heads", "--dense-steps", 1, "--prompts", prompts, "--output", out)
    outcome = cli("tune", *SMALL, "--calibrate", 0.75, *options)
    assert outcome.status == 0, outcome.err
    content = json.loads((out / "heads.json").read_text())
    layers = content["layers"]["transformer"]
    assert content["schedule"]["dense_steps"] == 1 and len(layers) == 6
    for layer, (order, losses) in zip(layers, content["calibration"]["losses"], strict=True):
        assert sorted(order) == [0, 1, 2, 3] and len(losses) == 3 and min(losses) > 0
        keep = layer["keep"] if layer else [1] * 4
        assert [keep[head] for head in order] == sorted(keep)
    assert sum(sum(layer["keep"]) if layer else 4 for layer in layers) == 18

    monkeypatch.setattr(search, "Probe", None)
    assert cli("tune", *SMALL, "--calibrate", 0.5, *options).status == 0
    configs = Setting.read(out / "heads.json").layers["transformer"]
    assert sum(sum(config.keep) if config else 4 for config in configs) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--target, such as 1.5x, or --calibrate SHARE, or --cache mag"),
        (("--target", "2x", "--calibrate", 0.9), "Leave out --target and --cache"),
        (("--cache", "mag", "--calibrate", 0.9), "Leave out --target and --cache"),
        (("--cache", "first-block"), "--target, such as 1.5x"),
        (("--calibrate", 0.9, "--method", "gna"), "at most one --method, of heads, sparge; got gna"),
        (("--calibrate", 0.9, "--compile"), "which --compile hides"),
        (("--target", "banana"), "banana"),
        (("--target", "0x"), "--target is a speed-up above 0"),
        (("--target", "-1x"), "--target is a speed-up above 0"),
        (("--target", "1e999x"), "is not finite"),
        (("--target", "pnsr>=25"), "Did you mean 'psnr'"),
    ],
)
def test_refused_before_the_model_is_loaded(cli, options, message):
    outcome = cli("tune", *SMALL, *options)
    assert outcome.status == 2 and message in outcome.err
