"""The self-check: measuring against brute force, and what `verify` and `keep_dense_above` do in a model."""

import json
import math

import pytest
import torch
from messages import names
from tiny_models import get, run

import dit_accel
from dit_accel.hooks import selfcheck
from dit_accel.hooks.report import LayerReport, Report
from dit_accel.hooks.selfcheck import ComputedAttention, SelfCheck, sample
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.plans.routed import RoutedPlan
from dit_accel.setting import Setting

WINDOW = {"window": (3, 5, 4)}
GRID = dit_accel.TokenGrid(3, 5, 7, text=6, text_first=True, conditioning=4)
CASES = [
    (GRID, "gna", {"window": (3, 3, 3)}, None),
    (dit_accel.TokenGrid(3, 5, 7, text=6), "tile", {"references": 1}, (6, 2)),
    (GRID, "radial", {"decay": 0.2, "rule": "released", "block": 16, "sink": False}, (3, 5)),
    (GRID, "sla", {"topk": 0.3, "block": 16}, None),
    (dit_accel.TokenGrid(3, 5, 7, text=6), "sla", {"topk": 0.3, "block": 16, "order": "tile"}, (1, 6)),
    (GRID, "sol", {"block": 8, "block_q": 8, "order": "tile"}, (3, 5)),
    (GRID, "sparge", {"topk": 0.3, "block_q": 16, "block": 8}, None),
    (dit_accel.TokenGrid(3, 5, 7, text=6), "rectified", {"block": 8, "block_q": 8}, (1, 6)),
]


def measure(q, k, v, out, plan, rows=selfcheck.ROWS, **call):
    return ComputedAttention("", "", None, plan, q, k, v, out, **call).measure(rows)


def tensors(grid, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, grid.tokens, 8, generator=generator, dtype=dtype)


def brute_force(q, k, v, out, plan, text_lens, scale, queries, bias=-math.inf):
    """Error and mass by sample and head from the whole matrix of weights."""
    grid = plan.grid
    if plan.method == "sla":
        attended = critical(q, k, plan)
    elif isinstance(plan, RoutedPlan):
        attended = listed(q, k, plan, scale)
    else:
        attended = plan.token_mask().expand(*q.shape[:2], -1, -1)
    text = torch.arange(grid.text_start, grid.text_start + grid.text)
    valid = torch.ones(q.shape[0], grid.tokens, dtype=torch.bool)
    for keys, length in zip(valid, text_lens or (), strict=False):
        keys[text[length:]] = False
    logits = q @ k.mT * scale
    weights = torch.where(valid[:, None, None], logits, logits + bias).softmax(-1)
    rows = grid.visual_start + queries
    dense = (weights @ v)[:, :, rows]
    error = (out[:, :, rows] - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1)
    return error, (weights * attended)[:, :, rows].sum(-1).mean(-1)


def critical(q, k, plan):
    routing = SparseLinearAttention(q.shape[-1], **vars(plan.config)).route(q, k, plan.grid).critical
    slots = routing.query_order.index()
    pairs = routing.dense().repeat_interleave(16, -2).repeat_interleave(16, -1)
    mask = torch.zeros(*pairs.shape[:2], plan.grid.tokens, plan.grid.tokens, dtype=torch.bool)
    mask[:, :, slots[slots >= 0][:, None], slots[slots >= 0]] = pairs[:, :, slots >= 0][..., slots >= 0]
    return mask


def listed(q, k, plan, scale):
    """The pairs in listed blocks, text and conditioning besides, by loops."""
    lists, grid = plan.route(q, k, scale=scale), plan.grid
    rows, columns = (plan.block_of(order).tolist() for order in (plan.query_order, plan.key_order))
    mask = torch.ones(*q.shape[:2], grid.tokens, grid.tokens, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (*q.shape[:2], grid.visual))).tolist():
        visited = set(lists.indices[b, h, rows[i], : lists.counts[b, h, rows[i]]].tolist())
        mask[b, h, grid.visual_start + i, grid.visual_rows] = torch.tensor([block in visited for block in columns])
    return mask


@pytest.mark.parametrize("chunk", [selfcheck.CHUNK, 700])
@pytest.mark.parametrize("rows", [1000, 20])
@pytest.mark.parametrize(("grid", "method", "config", "text_lens"), CASES, ids=lambda value: str(value)[:20])
def test_measured_is_exact(grid, method, config, text_lens, rows, chunk, monkeypatch):
    monkeypatch.setattr(selfcheck, "CHUNK", chunk)
    q, k, v = tensors(grid)
    plan, lens = dit_accel.plan(method, grid, **config), None if text_lens is None else torch.tensor(text_lens)
    out = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    measured = measure(q, k, v, out, plan, scale=0.6, text_lens=lens, rows=rows)
    error, mass = brute_force(q, k, v, out, plan, text_lens, 0.6, sample(grid.visual, rows))
    torch.testing.assert_close(measured.error, error)
    torch.testing.assert_close(measured.mass, mass)
    assert 0 < measured.mass.min() and measured.mass.max() < 1


def test_padding_that_is_weighed_counts():
    grid, lens = dit_accel.TokenGrid(3, 5, 7, text=6), (6, 2)
    q, k, v = tensors(grid)
    plan, bias = dit_accel.plan("gna", grid, window=(3, 3, 3)), torch.arange(2 * grid.tokens).view(2, -1) / 100
    measured = measure(q, k, v, v, plan, scale=0.6, text_lens=torch.tensor(lens), text_bias=bias, rows=20)
    bias = bias[:, None, :, None].double()
    error, mass = brute_force(q, k, v, v, plan, lens, 0.6, sample(grid.visual, 20), bias)
    torch.testing.assert_close((measured.error, measured.mass), (error, mass))


def test_what_a_method_computes_is_as_far_off_as_the_mass_it_dropped():
    """Of the weights over all keys: dropping half the mass is an error, and keeping it all is none."""
    q, k, v = tensors(GRID)
    full = dit_accel.plan("gna", GRID, window="full")
    nothing = measure(q, k, v, dit_accel.attention(q, k, v, full, impl="reference"), full)
    assert nothing.error.max() < 1e-12 and (nothing.mass - 1).abs().max() < 1e-12
    part = dit_accel.plan("gna", GRID, window=(1, 3, 3))
    measured = measure(q, k, v, dit_accel.attention(q, k, v, part, impl="reference"), part)
    assert measured.error.min() > 0.1 and measured.mass.max() < 0.6


def test_the_whole_is_not_the_mean_of_its_heads():
    plan = dit_accel.plan("gna", GRID, window=(1, 3, 3))
    q, k, v = tensors(GRID)
    v[:, 0] *= 100
    measured = measure(q, k, v, torch.zeros_like(q).index_copy(1, torch.tensor([0]), 2 * v[:, :1]), plan)
    error, mass = selfcheck.whole(measured.sums())
    assert error == pytest.approx((measured.difference.sum() / measured.size.sum()).sqrt().item())
    assert mass == pytest.approx(measured.mass.mean().item())
    halves = selfcheck.whole(
        sum(
            measure(q[:, part], k[:, part], v[:, part], 2 * v[:, part], plan).sums()
            for part in (slice(0, 1), slice(1, 3))
        )
    )
    assert halves == pytest.approx(selfcheck.whole(measure(q, k, v, 2 * v, plan).sums()))


def test_nothing_to_compare_with():
    """Dense attention of zeros, as a model that starts there has."""
    assert selfcheck.whole(torch.tensor([0.0, 0.0, 3.0, 4.0])) == (0.0, 0.75)
    assert selfcheck.whole(torch.tensor([1.0, 0.0, 3.0, 4.0])) == (math.inf, 0.75)
    layer = LayerReport("transformer", "attn", relative_error=math.inf, kept_mass=math.nan)
    report = Report(Setting.parse("gna:window=2"), "auto", {}, {}, [layer])
    (record,) = json.loads(json.dumps(report.as_dict(), allow_nan=False))["layers"]
    assert (record["relative_error"], record["kept_mass"]) == ("inf", "nan")


def test_sampled_queries_are_the_same_every_time():
    assert sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(sample(1000, 50), sample(1000, 50)) and len(sample(1000, 50).unique()) == 50


def test_verify_measures_the_first_sparse_call_alone(monkeypatch):
    tiny, calls, original = get("wan", "t2v"), [], ComputedAttention.measure
    monkeypatch.setattr(ComputedAttention, "measure", lambda call: calls.append(call.plan) or original(call))
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", verify="first-call", dense_steps=1, **WINDOW) as accel:
        plain = []
        for step in range(3):
            accel.set_step(step, 3)
            plain.append(run(transformer, tiny.call()))
            assert len(calls) == (0, 2, 2)[step]
        report = accel.report()
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        assert torch.equal(run(transformer, tiny.call()), plain[1]) and torch.equal(plain[2], plain[1])
    for layer in report.layers:
        assert (layer.sparse_calls, layer.dense_calls) == (2, 1)
        assert 0 < layer.relative_error < 1 and 0 < layer.kept_mass < 1
        assert f"relative error {layer.relative_error:.3g}, softmax mass kept {layer.kept_mass:.3f}" in str(report)


def test_without_verify_nothing_is_measured(monkeypatch):
    tiny = get("wan", "t2v")
    monkeypatch.setattr(ComputedAttention, "measure", lambda call: pytest.fail("measured"))
    with dit_accel.accelerated(tiny.shared, "gna", **WINDOW) as accel:
        run(tiny.shared, tiny.call())
    assert accel.report().layers[0].relative_error is None
    assert "relative error" not in str(accel.report())


@pytest.mark.parametrize(("method", "config"), [("gna", WINDOW), ("sla", {"topk": 0.35, "block": 16})])
def test_layers_above_the_limit_stay_dense(method, config):
    """Between the errors of the layers: the worse ones are dense from their first call on, as with `dense_layers`."""
    tiny = get("flux", "t2i")
    config = {"window": (1, 5, 4)} if method == "gna" else config
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, method, verify="first-call", **config) as accel:
        run(transformer, tiny.call())
        first = [layer.relative_error for layer in accel.report().layers]
    limit = (min(first) + max(first)) / 2
    kept_dense = dit_accel.accelerate(transformer, method, verify="first-call", keep_dense_above=limit, **config)
    results = [run(transformer, tiny.call()) for _ in range(2)]
    report = kept_dense.report()
    kept_dense.remove()
    dense = tuple(index for index, layer in enumerate(report.layers) if layer.dense_calls)
    assert 0 < len(dense) < len(report.layers)
    for index, layer in enumerate(report.layers):
        assert (layer.dense_calls, layer.sparse_calls) == ((2, 0) if index in dense else (0, 2))
        assert (layer.relative_error > limit) == (index in dense)
    assert f"keep_dense_above={limit}: relative error" in str(report)
    with dit_accel.accelerated(transformer, method, dense_layers=dense, **config):
        wanted = run(transformer, tiny.call())
    assert all(torch.equal(result, wanted) for result in results)


def test_a_call_that_fails_is_followed_by_another_check():
    """As after too little memory: layers behind the failure are measured in the next call."""
    tiny = get("wan", "t2v")
    transformer, failures = tiny.build(), [torch.OutOfMemoryError()]

    def fail(*_):
        if failures:
            raise failures.pop()

    handle = transformer.blocks[0].ffn.register_forward_hook(fail)
    accel = dit_accel.accelerate(transformer, "gna", verify="first-call", keep_dense_above=1e-6, **WINDOW)
    with pytest.raises(torch.OutOfMemoryError):
        run(transformer, tiny.call())
    for _ in range(2):
        run(transformer, tiny.call())
    handle.remove()
    layers = accel.report().layers
    assert all(layer.relative_error > 1e-6 and not layer.sparse_calls for layer in layers)
    hooks = len(transformer._forward_hooks)
    accel.remove()
    assert hooks == len(transformer._forward_hooks)  # that of the check went with the check


def test_watchers_see_every_sparse_call():
    tiny, seen = get("wan", "t2v"), []
    with dit_accel.accelerated(tiny.shared, "gna", dense_layers=(1,), **WINDOW) as accel:
        with accel.watch(seen.append):
            for step in range(2):
                accel.set_step(step, 2)
                run(tiny.shared, tiny.call())
        run(tiny.shared, tiny.call())
    assert [(call.transformer, call.layer, call.step.index) for call in seen] == [
        ("transformer", "blocks.0.attn1", 0),
        ("transformer", "blocks.0.attn1", 1),
    ]
    call = seen[0]
    assert isinstance(call, ComputedAttention) and call.plan.grid == tiny.grid
    again = call.plan.attend(call.q, call.k, call.v, scale=call.scale)
    assert torch.equal(again, call.out)
    assert not math.isnan(call.measure(rows=8).error.max())
    with dit_accel.accelerated(tiny.shared, "gna", **WINDOW) as accel, accel.watch(seen.append):
        inputs = tiny.call()
        run(tiny.shared, inputs)
    assert seen[-1].step.count is None, "a bare transformer tells the step by its timestep"


def test_a_compiled_transformer_is_checked_before_it_is_compiled():
    tiny = get("wan", "t2v")
    for compiled in ("whole", "blocks"):
        torch._dynamo.reset()
        transformer = tiny.build()
        with dit_accel.accelerated(transformer, "gna", verify="first-call", **WINDOW) as accel:
            if compiled == "blocks":
                transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
                call = transformer
            else:
                call = torch.compile(transformer, backend="eager")
            with pytest.raises(dit_accel.DitAccelError, match=names("verify='first-call'")):
                run(call, tiny.call())
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", verify="first-call", **WINDOW) as accel:
        eager = run(transformer, tiny.call())
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(run(transformer, tiny.call()), eager)
        assert all(layer.sparse_calls == 2 and layer.relative_error for layer in accel.report().layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": True}, "verify True"),
        ({"verify": "first-call", "keep_dense_above": 0}, "0"),
        ({"keep_dense_above": 0.1}, "verify='first-call'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        dit_accel.accelerate(get("wan", "t2v").shared, "gna", **settings, **WINDOW)
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        SelfCheck(**settings)
