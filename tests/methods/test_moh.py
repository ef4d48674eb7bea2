"""moh: against its definition, what is computed, bits of dense with all heads, the router's gradients and its loss."""

import dataclasses

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from messages import names
from torch._subclasses.fake_tensor import FakeTensorMode

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.methods import moh
from dit_accel.methods.moh import BALANCE, Config, HeadRouter
from dit_accel.tokens import TokenGrid
from dit_accel.train.objectives import Outputs, losses

IN_MODELS = {"shared": 0.0, "routed": 0.5}
GRID = TokenGrid(3, 4, 5, text=7)
HEADS, DIM = 4, 16
SETTINGS = {
    "one": {"shared": 0.25, "routed": 0.5},
    "scores": {"shared": 0.5, "routed": 0.25, "weights": "scores"},
    "all-routed": {"shared": 0.0, "routed": 0.5, "weights": "scores"},
}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = 2, HEADS, GRID.tokens, DIM
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def router(config, seed=5):
    module = HeadRouter(DIM, HEADS, Config(**config))
    module.weight.data = 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed))
    return module


def by_hand(weight, q, config):
    """p and g token by token, as the equations: [2, N, routed heads] and [2, N, heads]."""
    config, q = Config(**config), q.detach()
    shared, count = config.counts(HEADS)
    per_token = []
    for sample in range(2):
        for token in range(GRID.tokens):
            x = q[sample, :, token]
            logits = weight @ x.flatten()
            p = torch.softmax(logits[: HEADS - shared] + x[shared:].square().mean(-1).sqrt(), 0)
            top = p >= p.sort(descending=True).values[count - 1]
            if config.weights == "one":
                straight = torch.where(top, 1.0, 0.0) + p - p.detach()
                g = torch.cat([torch.ones(shared), straight])
            else:
                stages = 2 * torch.softmax(logits[-2:], 0) if shared else torch.ones(2)
                first = stages[0] * shared * torch.softmax(logits[HEADS - shared : HEADS], 0) if shared else p[:0]
                g = torch.cat([first, stages[1] * (HEADS - shared) * p * top])
            per_token.append((p, torch.ones(HEADS) if token >= GRID.visual else g))
    return [torch.stack(part).view(2, GRID.tokens, -1) for part in zip(*per_token, strict=True)]


def definition(q, k, v, weight, lens, config):
    valid = torch.arange(GRID.tokens) < GRID.visual + lens[:, None, None, None]
    out, _ = plain_attention(q, k, v, valid, DIM**-0.5)
    return out * by_hand(weight, q, config)[1].to(q).mT[..., None]


@pytest.mark.parametrize("impl", ["auto", "portable", "reference"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_forward_and_gradients_are_those_of_the_definition(name, trains, impl):
    """The router's own too, where it trains: straight through to every routed head with weights of one."""
    config, module = SETTINGS[name], router(SETTINGS[name]).requires_grad_(trains)
    plan, lens = dit_accel.plan("moh", GRID, **config), torch.tensor([7, 2])
    upstream = torch.randn(2, HEADS, GRID.tokens, DIM, generator=torch.Generator().manual_seed(1))
    results = {}
    for kind, dtype in (("ours", torch.float32), ("plain", torch.float32), ("exact", torch.float64)):
        qkv, weight = tensors(dtype), module.weight.to(dtype)
        if kind == "ours":
            out = plan.attend(*qkv, text_lens=lens, impl=impl, module=module)
        else:
            out = definition(*qkv, weight, lens, config)
        leaves = [*qkv, *([module.weight] if trains else [])]
        results[kind] = out, *torch.autograd.grad(out, leaves, upstream.to(dtype))
    for part, got, plain, exact in zip(("out", "dq", "dk", "dv", "dW"), *results.values(), strict=False):
        assert_accurate(part, got, plain, exact)
        assert exact.abs().max() > 0


def test_rows_of_skipped_heads_are_not_computed(monkeypatch):
    """The rows that reach the kernel: of a shared head all, of the others what tokens take, and text."""
    rows, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        moh.F, "scaled_dot_product_attention", lambda q, *a, **b: rows.append(q[..., 0].numel()) or attend(q, *a, **b)
    )
    plan, (q, k, v) = dit_accel.plan("moh", GRID, shared=0.25, routed=0.25), tensors()
    with torch.no_grad():
        plan.attend(q, k, v)
    assert rows[0] == 2 * GRID.tokens and sum(rows[1:]) == 2 * (GRID.visual + 3 * GRID.text)
    assert sum(rows) / (2 * HEADS * GRID.tokens) == pytest.approx(plan.density, abs=1e-12)


def test_all_heads_on_are_the_bits_of_dense_and_a_router_starts_without_parameters(tiny_wan, wan_inputs):
    model, inputs = tiny_wan(), wan_inputs()
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        with dit_accel.accelerated(model, "moh", shared=0.5, routed=0.5) as accel:
            assert torch.equal(model(**inputs, return_dict=False)[0], dense) and accel.learned_weights()
    q, k, _ = tensors()
    computed = dit_accel.plan("moh", GRID, shared=0.5, routed=0.25).route(q, k).counts
    norms = q[:, 2:, : GRID.visual].norm(dim=-1)
    assert computed[:, :2].all() and torch.equal(computed[:, 2:].bool(), norms == norms.amax(1, keepdim=True))


def test_a_trained_router_is_saved_loaded_and_removed(tiny_wan, wan_inputs, tmp_path):
    model, inputs = tiny_wan(), wan_inputs()
    accel = dit_accel.accelerate(model, "moh", shared=0.0, routed=0.5, weights="scores")
    before = model(**inputs, return_dict=False)[0]
    for module in accel.learned_weights().values():
        module.weight.data = 0.3 * torch.randn(module.weight.shape)
    wanted = model(**inputs, return_dict=False)[0]
    accel.save_pretrained(tmp_path)
    accel.remove()
    assert not any("head_router" in name for name in model.state_dict())
    dit_accel.load(model, tmp_path)
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted) and not torch.equal(wanted, before)


def test_the_self_check_knows_which_heads_a_token_takes():
    q, k, v = (x.detach() for x in tensors())
    plan, module = dit_accel.plan("moh", GRID, **SETTINGS["one"]), router(SETTINGS["one"])
    out = plan.attend(q, k, v, module=module)
    check = ComputedAttention("", "", None, plan, q, k, v, out, module=module).measure()
    share = plan.route(q, k, module=module).counts.double().mean(-1)
    torch.testing.assert_close(check.mass, share, atol=1e-6, rtol=0)
    assert (check.error[:, 0] < 1e-5).all() and (check.error[:, 1:] > 0.1).all()


def test_the_router_computes_where_its_queries_are():
    with FakeTensorMode():
        with torch.device("cuda"):
            module = HeadRouter(DIM, HEADS, Config(**SETTINGS["one"]))
        gates = module(torch.zeros(1, HEADS, 5, DIM))
    assert module.weight.device.type == "cuda" and {part.device.type for part in gates} == {"cpu"}


def test_the_load_balance_loss_is_the_papers():
    """Equation 7 over the visual tokens of both samples, with its gradient; other methods have no router."""
    q, k, v = tensors()
    plan, module = dit_accel.plan("moh", GRID, **SETTINGS["one"]), router(SETTINGS["one"]).requires_grad_(True)
    call = ComputedAttention("", "", None, plan, q, k, v, v, module=module)
    loss = losses(["balance"], Outputs(v, records={"balance": [BALANCE.record(call)]}), None, v)["balance"]
    p = by_hand(module.weight, q, SETTINGS["one"])[0][:, : GRID.visual].flatten(0, 1)
    chosen = p >= p.sort(descending=True).values[:, 1:2]
    wanted = sum(chosen[:, head].float().mean() * p[:, head].mean() for head in range(3))
    torch.testing.assert_close(loss, wanted)
    (of_weight, of_q), (wanted_of_weight, _) = (
        torch.autograd.grad(term, (module.weight, q), allow_unused=True) for term in (loss, wanted)
    )
    torch.testing.assert_close(of_weight, wanted_of_weight)
    assert of_q is None
    assert BALANCE.record(dataclasses.replace(call, plan=dit_accel.plan("dense", GRID))) is None
    with pytest.raises(DitAccelError, match="balance"):
        losses(["balance"], Outputs(v), None, v)


def test_what_it_cannot_do_is_refused(tiny_wan):
    with pytest.raises(DitAccelError, match=names(0.5, 0.75)):
        dit_accel.plan("moh", GRID, routed=0.75)
    with pytest.raises(DitAccelError, match=names("routed=0.25", 2)):
        dit_accel.accelerate(model := tiny_wan(), "moh")
    assert not any("head_router" in name for name, _ in model.named_modules())
    q, k, v = tensors()
    with pytest.raises(DitAccelError, match=names("moh", 4)):
        dit_accel.plan("moh", GRID).attend(q[:, :2], k[:, :2], v[:, :2], heads=(2, 4))
