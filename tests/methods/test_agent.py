"""agent: against its definition in fp64, as many agents as tokens, its cost, published settings."""

import dataclasses

import pytest
import torch
from accuracy import assert_accurate
from roundings import gradient_sizes

import dit_accel
from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import portable
from dit_accel.schedule import Schedule, Step
from dit_accel.tokens import TokenGrid
from dit_accel.tune import space
from dit_accel.tune.request import TuneRequest

# ragged tiles on each axis
IN_MODELS = {"tile": (1, 2, 2)}
VIDEO = TokenGrid(3, 5, 7)
TEXT = TokenGrid(3, 5, 7, text=9, conditioning=4)
FIRST = TokenGrid(2, 6, 9, text=11, text_first=True)
CASES = {
    "visual": (VIDEO, None, None, (1, 1)),
    "text lengths": (TEXT, (3, 9), None, (1, 4)),
    "text first": (FIRST, None, None, (1, 16)),
    "weighed text": (TEXT, (3, 9), -1.0, (4, 1)),
}


def inputs(grid, dim=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, grid.tokens, 3, dim, generator=generator).transpose(1, 2) for _ in range(4)]


def by_definition(q, k, v, grid, tile, exponent, shortcut, lens, bias, scale, upstream=None):
    """Token by token: which tile each token is in, two softmaxes, and plain attention of the other queries.

    With `upstream`, the output's gradient, the sizes of the terms of dq, dk and dv instead of the output.
    """
    at = grid.visual_rows
    tiles = (grid.coordinates() // torch.tensor(tile)).unique(dim=0, return_inverse=True)[1]
    members = torch.nn.functional.one_hot(tiles).T.to(q)
    members = members / members.sum(-1, keepdim=True)
    agents = members @ q[:, :, at]
    added = torch.zeros(len(q), 1, 1, grid.tokens, dtype=q.dtype)
    if lens is not None:
        place = torch.arange(grid.tokens) - grid.text_start
        behind = (place >= torch.tensor(lens)[:, None]) & (place < grid.text)
        added = added.masked_fill(behind[:, None, None], -torch.inf if bias is None else bias)

    def attention(q, k, v, factor, added=0.0, size=None):
        logits = q @ k.mT * factor + added
        out = logits.softmax(-1) @ v
        if size is None:
            return out
        return gradient_sizes(q, k, v, size, out, logits, logits.logsumexp(-1), factor, torch.float32)

    gathered, second = attention(agents, k, v, scale, added), scale**exponent
    if upstream is None:
        out = attention(q, k, v, scale, added)
        visual = attention(q[:, :, at], agents, gathered, second) + shortcut * v[:, :, at]
        return torch.cat([out[:, :, : at.start], visual, out[:, :, at.stop :]], 2)
    size = upstream.abs()
    sizes = attention(q, k, v, scale, added, size.index_fill(2, torch.arange(at.start, at.stop), 0))
    back = attention(q[:, :, at], agents, gathered, second, size=size[:, :, at])
    through = attention(agents, k, v, scale, added, back["dv"])
    sizes["dq"][:, :, at] = back["dq"] + members.T @ (back["dk"] + through["dq"])
    sizes["dv"][:, :, at] += shortcut * size[:, :, at]
    return {name: sizes[name] + (0 if name == "dq" else through[name]) for name in sizes}


@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize(("grid", "lens", "bias", "scale"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("config", [{}, {"tile": (2, 2, 3), "exponent": 1.0, "shortcut": 0.0}], ids=str)
def test_forward_and_gradients_are_those_of_the_definition(config, grid, lens, bias, scale, impl):
    *tensors, upstream = inputs(grid)
    plan, scale = dit_accel.plan("agent", grid, **config), 24**-0.5 * scale[0] / scale[1]
    call = {"scale": scale, "impl": impl, "text_lens": None if lens is None else torch.tensor(lens)}
    if bias is not None:
        call["text_bias"] = torch.full((2, grid.tokens), bias)
    settings, results = dataclasses.asdict(plan.config), {}
    for kind, dtype in (("ours", torch.float32), ("plain", torch.float32), ("exact", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        if kind == "ours":
            out = plan.attend(*leaves, **call)
        else:
            out = by_definition(*leaves, grid, **settings, lens=lens, bias=bias, scale=scale)
        results[kind] = out, *torch.autograd.grad(out, leaves, upstream.to(dtype))
    wide = [x.double() for x in tensors]
    sizes = by_definition(*wide, grid, **settings, lens=lens, bias=bias, scale=scale, upstream=upstream.double())
    for name, got, plain, exact in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True):
        assert_accurate(name, got, plain, exact, sizes.get(name))


def test_the_reference_is_the_definition_in_double():
    q, k, v, _ = (x.double() for x in inputs(TEXT))
    plan = dit_accel.plan("agent", TEXT)
    settings = dataclasses.asdict(plan.config)
    exact = by_definition(q, k, v, TEXT, **settings, lens=(3, 9), bias=None, scale=24**-0.5)
    output = dit_accel.attention(q, k, v, plan, text_lens=torch.tensor([3, 9]), impl="reference")
    torch.testing.assert_close(output, exact, rtol=1e-13, atol=1e-13)


def test_as_many_agents_as_tokens_are_a_double_softmax():
    q, k, v, _ = (x.double() for x in inputs(VIDEO))
    plan = dit_accel.plan("agent", VIDEO, tile=(1, 1, 1), exponent=1.0, shortcut=0.0)
    scale = 24**-0.5
    double = (q @ q.mT * scale).softmax(-1) @ ((q @ k.mT * scale).softmax(-1) @ v)
    torch.testing.assert_close(dit_accel.attention(q, k, v, plan, impl="reference"), double, rtol=1e-13, atol=1e-13)


def test_the_cost_is_linear_in_the_agents(monkeypatch):
    """Pairs that reach the kernel: n agents see all tokens, and all tokens n agents."""
    seen, forward = [], portable.forward
    monkeypatch.setattr(
        portable, "forward", lambda call: seen.append(call.q.shape[2] * call.k.shape[2]) or forward(call)
    )
    grid, total = TokenGrid(2, 8, 8), torch.zeros(2)
    q, k, v, _ = inputs(grid)
    for tile, agents in (((1, 4, 4), 8), ((1, 4, 2), 16), ((2, 1, 2), 32), ((9, 9, 9), 1)):
        plan = dit_accel.plan("agent", grid, tile=tile)
        with torch.no_grad():
            plan.attend(q, k, v, impl="portable", density_sum=total)
        assert sum(seen) == plan.pairs == 2 * agents * grid.tokens
        seen.clear()
    assert total.tolist() == pytest.approx([2 * (8 + 16 + 32 + 1) / grid.tokens, 4])


def test_the_published_setting_and_its_steps():
    """AgentSD at 512 x 512: 64 x 64 tokens, one agent for 4 x 4 of them, in the first 20 of 50 steps."""
    plan = dit_accel.plan("agent", TokenGrid(1, 64, 64))
    assert plan.tiles.visual_blocks == 256 and plan.second_scale(40**-0.5) == pytest.approx(40 ** (-0.5 * 0.3))
    schedule = Schedule(dense_last_steps=0.6)
    assert [step for step in range(50) if schedule.dense_step(Step(step, 50)) is None] == list(range(20))


def test_it_is_experimental_and_nobody_takes_it_unasked(tiny_wan, wan_inputs, tmp_path):
    with dit_accel.accelerated(model := tiny_wan(), "agent", tile=(1, 2, 2), verify="first-call") as accel:
        model(**wan_inputs())
        report = accel.report()
    assert any("experimental" in note for note in report.notes)
    assert all(layer.relative_error > 0 and layer.kept_mass == 0 for layer in report.layers)
    assert registry.get_method("agent").at_density is None
    family = next(iter(registry.get_families().values()))
    request = TuneRequest(model="demo", prompts="demo", target="1.5x", output=tmp_path)
    tried, _ = space.settings(request, TokenGrid(5, 16, 16), [family], 10)
    assert {"agent", "gna"} & {candidate.method for candidate in tried} == {"gna"}


@pytest.mark.parametrize("config", [{"tile": (0, 4, 4)}, {"tile": 4}, {"exponent": -1.0}, {"shortcut": "much"}])
def test_settings_are_checked(config):
    with pytest.raises(DitAccelError, match=next(iter(config))):
        dit_accel.plan("agent", VIDEO, **config)
