"""Routed plans, by a method that is one file outside the package: `tests/methods/outside/nearest.py`."""

import json
import pathlib
import sys

import pytest
import tiny_models
import torch
from masked_reference import assert_no_worse, plain_and_exact
from messages import names
from roundings import assert_masked
from tiny_models import run
from typer.testing import CliRunner

import dit_accel
from dit_accel import registry
from dit_accel.cli.app import app
from dit_accel.tokens import TokenGrid

OUTSIDE = pathlib.Path(__file__).parent.parent / "methods" / "outside"
SETTINGS = {"reach": 1, "block_q": 16, "block_k": 8}
# 45 visual tokens: a tail of 13 in the last query block, of 5 in the last key block
CASES = {
    "visual": (TokenGrid(3, 5, 3), None),
    "text last": (TokenGrid(3, 5, 3, text=11, conditioning=9), None),
    "text lengths": (TokenGrid(3, 5, 3, text=11, conditioning=9), (4, 11)),
    "text first": (TokenGrid(3, 5, 3, text=11, text_first=True), (0, 7)),
}
TINY = [tiny_models.get("wan", "t2v"), tiny_models.get("flux", "t2i")]


@pytest.fixture(autouse=True)
def nearest(monkeypatch):
    """The method is known for one test."""
    from dit_accel import methods

    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(OUTSIDE)])
    registry.get_methods.cache_clear()
    yield
    registry.get_methods.cache_clear()
    sys.modules.pop("dit_accel.methods.nearest", None)


def seen(q, grid, text_lens=None):
    """The pairs of the method, token by token from its definition: bool [B, H, N, N]."""
    start, visual = grid.visual_start, grid.visual
    token = torch.arange(visual)
    blocks = token // SETTINGS["block_q"]
    means = torch.stack([q[:, :, start : start + visual][:, :, blocks == block].mean((-1, -2)) for block in blocks], -1)
    reach = torch.where(means > 0, 3 * SETTINGS["reach"], SETTINGS["reach"])
    distance = (blocks * SETTINGS["block_q"] // SETTINGS["block_k"])[:, None] - token // SETTINGS["block_k"]
    mask = torch.ones(*q.shape[:2], grid.tokens, grid.tokens, dtype=torch.bool)
    mask[:, :, start : start + visual, start : start + visual] = distance.abs() <= reach[..., None]
    if text_lens is not None:
        position = torch.arange(grid.tokens) - grid.text_start
        padding = (position >= torch.tensor(text_lens)[:, None]) & (position < grid.text)
        mask &= ~padding[:, None, None]
    return mask


def inputs(grid, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, grid.tokens, 3, 24).transpose(1, 2).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("impl", ["auto", "portable", "reference"])
@pytest.mark.parametrize(("grid", "text_lens"), CASES.values(), ids=CASES)
def test_forward_and_gradients_equal_masked_attention(grid, text_lens, impl):
    *tensors, gradient = inputs(grid)
    mask = seen(tensors[0], grid, text_lens)
    assert len(mask[:, :, grid.visual_start : grid.visual_start + grid.visual].sum(-1).unique()) > 3  # counts differ
    plan = dit_accel.plan("nearest", grid, **SETTINGS)
    lens = None if text_lens is None else torch.tensor(text_lens)

    def attend(q, k, v):
        return dit_accel.attention(q, k, v, plan, text_lens=lens, impl=impl)

    assert_masked(attend, tensors, gradient, mask)


@pytest.mark.parametrize(("grid", "text_lens"), CASES.values(), ids=CASES)
def test_density_is_measured(grid, text_lens):
    """As many pairs as the masks have; text counts whole, whatever its valid length."""
    q, k, v, _ = inputs(grid)
    plan, total = dit_accel.plan("nearest", grid, **SETTINGS), torch.zeros(2)
    assert plan.pairs is None and plan.density is None
    for x in (q, -q):
        plan.attend(x, k, v, density_sum=total, text_lens=None if text_lens is None else torch.tensor(text_lens))
    expected = sum(seen(x, grid).float().mean().item() for x in (q, -q))
    assert total.tolist() == pytest.approx([expected, 2])


def test_kept_keys_are_the_mask():
    grid = CASES["text last"][0]
    q, k, *_ = inputs(grid)
    plan, queries = dit_accel.plan("nearest", grid, **SETTINGS), torch.arange(grid.visual)
    assert torch.equal(plan.kept_keys(queries, plan.route(q[:1], k[:1])), seen(q, grid)[0, 0, : grid.visual])


def test_compiles_whole():
    grid = CASES["text lengths"][0]
    q, k, v, _ = inputs(grid)
    plan, lens = dit_accel.plan("nearest", grid, **SETTINGS), torch.tensor([4, 11])

    def attend(q, k, v):
        return dit_accel.attention(q, k, v, plan, text_lens=lens)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_accelerates_a_model_and_reports_its_measured_density(tiny):
    masks = []

    def record(q, k, v):
        masks.append(seen(q, tiny.grid))
        return masks[-1]

    with dit_accel.accelerated(tiny.shared, "nearest", **SETTINGS, verify="first-call") as accel:
        for step in (0, 1, 1):
            accel.set_step(step, 2)
            sparse = run(tiny.shared, tiny.call())
        report = accel.report()
    assert_no_worse(sparse, *plain_and_exact(tiny, record))
    for layer, mask in zip(report.layers, masks, strict=True):
        expected = mask.float().mean().item()
        assert layer.density == pytest.approx(expected, rel=1e-5) and layer.sparse_calls == 3
        assert layer.step_density == pytest.approx({0: expected, 1: expected}, rel=1e-5)
        assert 0 < layer.kept_mass < 1 and 0 < layer.relative_error < 1
    assert report.grids == {str(tiny.grid): None} and "density from calls" in str(report)
    json.dumps(report.as_dict())


def test_what_is_not_known_before_a_call():
    plan = dit_accel.plan("nearest", CASES["visual"][0], **SETTINGS)
    for ask in (plan.token_mask, plan.block_mask, plan.image):
        with pytest.raises(dit_accel.DitAccelError, match=names("route")):
            ask()
    done = CliRunner().invoke(app, ["plan", "--method", "nearest:reach=2", "--grid", "3x5x3", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["density"] is None and facts["blocks_total"] == 3 * 6 and "ideal_speedup" not in facts
    assert CliRunner().invoke(app, ["plan", "--method", "nearest", "--grid", "3x5x3"]).exit_code == 0
    with pytest.raises(dit_accel.DitAccelError, match=names("heads 45 head_dim")):
        q = torch.zeros(1, 1, 45, 8)
        plan.attend(q, q[:, :, :9], q)
