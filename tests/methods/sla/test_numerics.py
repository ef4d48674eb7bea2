"""What SLA computes: output and gradients against fp64, its limits, and the same bits on every run."""

import pytest
import torch
import torch.nn.functional as F
from sla_calls import MARGINAL, SHORT, TEXT_FIRST, TEXT_LAST, VIDEO, WIDE, Case, check, setup, token_map

from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.plans.plan import attention
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

LINEAR = {"topk": 0.0, "block": 16}
CASES = {
    "one-token": Case(TokenGrid(1, 1, 1), {}),
    "one-token-marginal": Case(TokenGrid(1, 1, 1), {"linear_scope": "marginal"}),
    "63": Case(TokenGrid(1, 7, 9), {}, dim=40),
    "64": Case(TokenGrid(1, 8, 8), {}, dim=128),
    "65-marginal": Case(TokenGrid(1, 5, 13), {"linear_scope": "marginal", "skip": 0.5}),
    "1000": Case(TokenGrid(10, 10, 10), {"topk": 0.2}, heads=1),
    "1000-marginal": Case(TokenGrid(10, 10, 10), {"topk": 0.2, "linear_scope": "marginal"}, heads=1, size=4.0),
    "all": Case(VIDEO, SHORT),
    "all-x4": Case(VIDEO, SHORT, size=4.0),
    "all-x16": Case(VIDEO, SHORT, size=16.0, dim=128),
    "marginal": Case(VIDEO, MARGINAL),
    "marginal-x16": Case(VIDEO, MARGINAL, size=16.0, dim=40),
    "scale-given": Case(VIDEO, MARGINAL, factor=0.3),
    "elu": Case(VIDEO, {**SHORT, "feature_map": "elu"}),
    "relu-marginal": Case(VIDEO, {**MARGINAL, "feature_map": "relu"}, size=4.0),
    "focused": Case(VIDEO, {**SHORT, "feature_map": "focused"}, size=4.0),
    "focused-linear-text": Case(TEXT_LAST, {**LINEAR, "feature_map": "focused"}, text_lens=(21, 0)),
    "hedgehog": Case(VIDEO, {**SHORT, "feature_map": "hedgehog"}, size=4.0),
    "hedgehog-linear-text": Case(TEXT_FIRST, {**LINEAR, "feature_map": "hedgehog"}, text_lens=(0, 21)),
    "hedgehog-marginal-bf16": Case(VIDEO, {**MARGINAL, "feature_map": "hedgehog"}, dtype=torch.bfloat16),
    "linear": Case(VIDEO, LINEAR),
    "linear-marginal": Case(VIDEO, LINEAR | {"skip": 0.25, "linear_scope": "marginal"}, dim=40),
    "tiles": Case(VIDEO, {**SHORT, "order": "tile"}),
    "tiles-marginal": Case(VIDEO, {**MARGINAL, "order": "tile"}, size=4.0),
    "wide": Case(VIDEO, SHORT | WIDE),
    "wide-marginal-x4": Case(VIDEO, MARGINAL | WIDE, size=4.0),
    "wide-text-tiles": Case(TEXT_LAST, SHORT | WIDE | {"order": "tile"}, text_lens=(21, 3)),
    "narrow-text-marginal": Case(TEXT_FIRST, MARGINAL | {"block_q": 8}, text_lens=(5, 21)),
    "wide-one-block": Case(TokenGrid(1, 5, 13), {"topk": 0.5, "block_q": 128}, dtype=torch.bfloat16),
    "text-last": Case(TEXT_LAST, SHORT, text_lens=(21, 3)),
    "text-last-marginal": Case(TEXT_LAST, MARGINAL, text_lens=(0, 17), size=4.0),
    "text-first": Case(TEXT_FIRST, MARGINAL, text_lens=(5, 21)),
    "text-first-tiles": Case(TEXT_FIRST, {**SHORT, "order": "tile"}, text_lens=(1, 20)),
    "text-whole": Case(TEXT_LAST, SHORT),
    "bf16": Case(VIDEO, SHORT, dtype=torch.bfloat16),
    "bf16-marginal-x4": Case(VIDEO, MARGINAL, dtype=torch.bfloat16, size=4.0),
    "bf16-text-x16": Case(TEXT_FIRST, MARGINAL, dtype=torch.bfloat16, size=16.0, text_lens=(7, 0)),
    "fp16-elu": Case(VIDEO, {**MARGINAL, "feature_map": "elu"}, dtype=torch.float16),
    "reference-all": Case(TEXT_LAST, SHORT, text_lens=(21, 3), impl="reference"),
    "reference-marginal-tiles": Case(TEXT_FIRST, {**MARGINAL, "order": "tile"}, text_lens=(9, 2), impl="reference"),
    "reference-wide": Case(TEXT_FIRST, MARGINAL | WIDE, text_lens=(9, 2), impl="reference"),
    "reference-hedgehog": Case(TEXT_LAST, {**LINEAR, "feature_map": "hedgehog"}, text_lens=(0, 3), impl="reference"),
    "reference-focused": Case(VIDEO, {**MARGINAL, "feature_map": "focused"}, impl="reference"),
    "reference-bf16": Case(VIDEO, MARGINAL, dtype=torch.bfloat16, impl="reference"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_gradcheck(scope):
    """Every gradient, projection included, against finite differences, with text and a ragged tail."""
    torch.manual_seed(0)
    grid = TokenGrid(1, 3, 5, text=3)
    module = SparseLinearAttention(4, topk=0.3, skip=0.3, block=4, linear_scope=scope)
    tensors = [torch.randn(1, 1, grid.tokens, 4, dtype=torch.float64) for _ in range(3)]
    tensors += [torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]

    def call(q, k, v, weight, bias):
        state = {"proj.weight": weight, "proj.bias": bias}
        arguments = {"grid": grid, "text_lens": torch.tensor([2])}
        return torch.func.functional_call(module, state, (q, k, v), arguments)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors], fast_mode=True)


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_starts_as_pure_top_k(scope):
    """Projection zero: the module, the plan without a module, and attention over the critical blocks are the same."""
    case = Case(TEXT_LAST, {**SHORT, "linear_scope": scope})
    module = SparseLinearAttention(case.dim, **case.config)
    assert not module.proj.weight.any() and not module.proj.bias.any()
    _, (q, k, v), _, _ = setup(case)
    seen = token_map(module.route(q, k, case.grid).critical)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    out = module(q, k, v, grid=case.grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(out, attention(q, k, v, plan("sla", case.grid, **case.config)))
    # At the start the projection learns, though nothing flows through it yet.
    (gradient,) = torch.autograd.grad(out.square().sum(), [module.proj.weight])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("grid", [VIDEO, TEXT_LAST, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_top_k_of_everything_is_dense(grid, order):
    settings = plan("sla", grid, topk=1.0, skip=0.0, block=16, order=order)
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 64)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, settings), expected, rtol=0, atol=2e-6)
    assert settings.pairs == grid.tokens**2 and settings.density == 1


def test_runs_are_bit_equal():
    case = Case(TEXT_LAST, MARGINAL, text_lens=(21, 3))
    module, (q, k, v), lens, _ = setup(case)
    gradient = torch.randn(q.shape)
    first = None
    for _ in range(10):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = module(*leaves, grid=case.grid, text_lens=lens)
        results = [out.detach(), *torch.autograd.grad(out, [*leaves, *module.parameters()], gradient)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_autocast_routes_and_sums_in_fp32():
    """Under autocast the call is that of the cast inputs, bit for bit: no product of ours is cast again."""
    case = Case(VIDEO, MARGINAL)
    module, (q, k, v), _, _ = setup(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(q, k, v, grid=case.grid)
    assert torch.equal(out, module(*(x.bfloat16() for x in (q, k, v)), grid=case.grid))
