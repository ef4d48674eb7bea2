"""heads: against its definition, what is computed, bits of dense with all heads, and the choice by losses."""

import functools

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import ComputedAttention
from dit_accel.kernels.block_sparse import portable
from dit_accel.methods.heads import METHOD, ranked
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid
from dit_accel.tune.calibrate import cheapest

IN_MODELS = {"keep": (1, 0)}
GRID = TokenGrid(3, 4, 5, text=7)
KEEP = (1, 0, 1, 0)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, GRID.tokens, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v


def by_definition(q, k, v, text_lens):
    valid = torch.arange(GRID.tokens) < GRID.visual + text_lens[:, None, None, None]
    out, _ = plain_attention(q, k, v, valid, 16**-0.5)
    return out * torch.tensor(KEEP)[:, None, None]


@pytest.mark.parametrize("impl", ["auto", "portable", "reference"])
@pytest.mark.parametrize("lens", [(7, 7), (7, 2)])
def test_forward_and_gradients_are_those_of_the_definition(impl, lens):
    plan, lens = dit_accel.plan("heads", GRID, keep=KEEP), torch.tensor(lens)
    upstream = torch.randn(2, 4, GRID.tokens, 16, generator=torch.Generator().manual_seed(1))
    results = {}
    for kind, dtype in (("ours", torch.float32), ("plain", torch.float32), ("exact", torch.float64)):
        qkv = tensors(dtype)
        text_lens = None if impl == "auto" and bool(lens.eq(7).all()) else lens
        by_plan = kind == "ours"
        out = dit_accel.attention(*qkv, plan, text_lens=text_lens, impl=impl) if by_plan else by_definition(*qkv, lens)
        results[kind] = out, *torch.autograd.grad(out, qkv, upstream.to(dtype))
    for name, got, plain, exact in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True):
        assert_accurate(name, got, plain, exact)
        assert exact.abs().max() > 0
    assert not any(result[:, [1, 3]].any() for result in results["ours"])  # of skipped heads


def test_skipped_heads_are_not_computed(monkeypatch):
    """The heads that reach the kernel, and nothing of the others."""
    seen, forward = [], portable.forward
    monkeypatch.setattr(portable, "forward", lambda call: seen.append(call.q.shape[1]) or forward(call))
    plan = dit_accel.plan("heads", GRID, keep=KEEP)
    with torch.no_grad():
        q, k, v = (x.detach() for x in tensors())
        q[:, 1], k[:, 3], v[:, 3] = torch.nan, torch.nan, torch.nan
        out = dit_accel.attention(q, k, v, plan, impl="portable")
    assert seen == [2] and out.isfinite().all()
    assert plan.density == 0.5 and dit_accel.plan("heads", GRID).density == 1


def test_all_heads_on_are_the_bits_of_dense(tiny_wan):
    q, k, v = (x.detach() for x in tensors())
    dense = dit_accel.plan("dense", GRID).attend(q, k, v)
    for settings in ({}, {"keep": (1,) * q.shape[1]}):
        assert torch.equal(dit_accel.plan("heads", GRID, **settings).attend(q, k, v), dense)


def test_a_model_that_would_skip_no_head_is_refused(tiny_wan, wan_inputs):
    model = tiny_wan()
    with dit_accel.accelerated(model, "heads"), pytest.raises(DitAccelError, match="keeps every pair"):
        model(**wan_inputs())


def test_processes_that_share_a_sequence_compute_their_own_heads():
    """Each its part, the second of which has no head to compute."""
    q, k, v = (x.detach() for x in tensors())
    plan = dit_accel.plan("heads", GRID, keep=(1, 0, 0, 0))
    whole = plan.attend(q, k, v)
    parts = [plan.attend(q[:, at], k[:, at], v[:, at], heads=(at.start, 4)) for at in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(parts, 1), whole)
    # the self-check knows them too: a kept head has all of the mass, a skipped one none
    mass = [
        ComputedAttention("", "", None, plan, q[:, at], k[:, at], v[:, at], out, heads=(at.start, 4))
        .measure()
        .mass.mean(0)
        for at, out in zip((slice(0, 2), slice(2, 4)), parts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(mass), torch.tensor([1.0, 0, 0, 0]).double(), atol=1e-6, rtol=0)
    with pytest.raises(DitAccelError, match=names("keep", 4, 2)):
        plan.attend(q[:, :2], k[:, :2], v[:, :2])


@pytest.mark.parametrize("keep", [(), (0, 0), (1, 2), "none", 3])
def test_settings_are_checked(keep):
    with pytest.raises(DitAccelError, match="keep"):
        dit_accel.plan("heads", GRID, keep=keep)


def test_layers_keep_their_own_heads_in_one_graph(tiny_wan, wan_inputs):
    """One layer skips a head, the others are dense; compiled as eager."""
    model, inputs = tiny_wan(), wan_inputs()
    layers = [{"keep": [0] + [1] * (model.config.num_attention_heads - 1)}] + [None] * (len(model.blocks) - 1)
    setting = Setting.from_dict({"method": "heads", "layers": {"transformer": layers}})
    with dit_accel.accelerated(model, setting) as accel, torch.no_grad():
        eager = model(**inputs, return_dict=False)[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs, return_dict=False)[0]
    torch.testing.assert_close(compiled, eager)
    first, second, *_ = accel.report().layers
    assert (first.sparse_calls, second.dense_calls) == (2, 2) and first.density < 1


def test_heads_are_skipped_where_they_are_missed_least():
    """Two layers of four heads. In the first, heads 0 and 3 stand in for each other: together they are missed."""

    def loss(layer, config):
        skipped = [head for head, one in enumerate(config.keep) if not one]
        alone = ((1, 5, 4, 2), (3, 9, 9, 9))[layer]
        return sum(alone[head] for head in skipped) + (50 if layer == 0 and {0, 3} <= set(skipped) else 0)

    layers = [ranked(4, functools.partial(loss, layer)) for layer in range(2)]
    assert layers == [([0, 3, 2, 1], [1, 53, 57]), ([0, 1, 2, 3], [3, 12, 21])]

    def keeps(share):
        configs, density = cheapest(layers, 4, share, METHOD)
        keep = [(1, 1, 1, 1) if config is None else config.keep for config in configs]
        assert density == sum(map(sum, keep)) / 8 <= share
        return keep

    assert keeps(1.0) == [(1, 1, 1, 1), (1, 1, 1, 1)] and keeps(0.9) == [(0, 1, 1, 1), (1, 1, 1, 1)]
    assert keeps(0.75) == [(0, 1, 1, 1), (0, 1, 1, 1)]  # losses that add up would take 0 and 3
    assert keeps(0.5) == [(0, 1, 1, 1), (0, 0, 0, 1)]
    with pytest.raises(DitAccelError, match=names("0.2500")):
        keeps(0.2)
