"""Every method in every family: against the model run with the same token mask through masked attention."""

import copy
import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.registry import get_methods, make_config
from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class Case:
    """A model call whose sizes nothing divides, batch 2."""

    family: str
    module: str
    grid: TokenGrid

    def __str__(self):
        return f"{self.family}-{self.grid}".replace(" ", "")


CASES = [
    Case("wan", "transformer_wan", TokenGrid(5, 7, 9)),
    Case("flux", "transformer_flux", TokenGrid(1, 13, 11, text=13, text_first=True)),
    Case("flux", "transformer_flux", TokenGrid(3, 7, 9, text=13, text_first=True, reference=10)),
]
VIDEO = [case for case in CASES if case.grid.frames > 1]

METHODS = [
    ("gna", {"window": (3, 5, 4)}, VIDEO),
    ("gna", {"window": (1, 5, 4)}, CASES[1:2]),
    ("gna", {"window": 0.5, "stride": 2, "causal": (True, False, False)}, CASES),
    ("gna", {"window": (1, 3, 3), "dilation": (1, 2, 2)}, CASES),
    ("radial", {"decay": 0.2, "sink": False}, VIDEO),
    ("radial", {"decay": 0.2, "rule": "reference", "block": 16, "sink": False}, VIDEO),
    ("tile", {"references": 1}, VIDEO),
]


def runs():
    return [
        pytest.param(case, method, config, id=f"{case}-{method}-{'-'.join(map(str, config.values()))}".replace(" ", ""))
        for method, config, cases in METHODS
        for case in cases
    ]


@pytest.fixture
def model(tiny_wan, tiny_flux, wan_inputs, flux_inputs):
    """Makes a case's transformer and inputs."""

    def make(case):
        grid = case.grid
        if case.family == "wan":
            return tiny_wan(), wan_inputs(grid.frames, 2 * grid.height, 2 * grid.width)
        images = [(grid.height, grid.width)] * grid.frames + ([(2, grid.reference // 2)] if grid.reference else [])
        return tiny_flux(), flux_inputs(*images, text=grid.text)

    return make


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def in_double(transformer, inputs):
    floats = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return copy.deepcopy(transformer).double(), floats


def replace_attention(monkeypatch, case, attend):
    """Send the model's self-attention, [B, H, N, D], through `attend`."""
    module = importlib.import_module(f"diffusers.models.transformers.{case.module}")
    original = module.dispatch_attention_fn

    def dispatch_attention_fn(query, key, value, *args, **kwargs):
        if not query.shape[1] == key.shape[1] == case.grid.tokens:
            return original(query, key, value, *args, **kwargs)
        return attend(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch_attention_fn)


def assert_no_worse(ours, plain, exact):
    """At most twice the error of PyTorch in the same dtype, both against fp64, plus one rounding band."""
    band = torch.finfo(plain.dtype).eps * exact.abs().max().item()
    error, allowed = ((result.double() - exact).abs().max().item() for result in (ours, plain))
    assert error <= 2 * (allowed + band)


@pytest.mark.parametrize(("case", "method", "config"), runs())
def test_equals_masked_attention(case, method, config, model, monkeypatch):
    transformer, inputs = model(case)
    with dit_accel.accelerated(transformer, method, **config) as accel:
        ours = run(transformer, inputs)
    report, plan = accel.report(), dit_accel.plan(method, case.grid, **config)
    mask = plan.token_mask()
    assert report.dense_calls == 0
    assert all(layer.sparse_calls == 1 and layer.density == plan.density < 0.9 for layer in report.layers)
    assert report.grids == {str(case.grid): plan.density}
    assert plan.pairs == int(mask.sum())
    if config.get("rule") != "reference":
        assert plan.block_mask().partial.any(), "no partial block is tested here"

    dense = run(transformer, inputs)
    replace_attention(monkeypatch, case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    plain, exact = run(transformer, inputs), run(*in_double(transformer, inputs))
    assert_no_worse(ours, plain, exact)
    assert (ours - dense).abs().max() > 100 * (ours - plain).abs().max()


@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_untrained_sla_equals_masked_attention_on_its_critical_blocks(case, order, model, monkeypatch):
    transformer, inputs = model(case)
    config = {"topk": 0.35, "block": 16, "order": order}
    with dit_accel.accelerated(transformer, "sla", **config) as accel:
        ours = run(transformer, inputs)
    assert {layer.sparse_calls for layer in accel.report().layers} == {1}
    assert max(layer.density for layer in accel.report().layers) < 0.9

    masks = []

    def record(q, k, v):
        critical = SparseLinearAttention(q.shape[-1], **config).route(q, k, case.grid).critical
        rows, columns = (order.index() for order in (critical.query_order, critical.key_order))
        pairs = critical.dense().repeat_interleave(16, -2).repeat_interleave(16, -1)
        mask = torch.zeros(*pairs.shape[:2], case.grid.tokens, case.grid.tokens, dtype=torch.bool)
        mask[:, :, rows[rows >= 0][:, None], columns[columns >= 0]] = pairs[:, :, rows >= 0][..., columns >= 0]
        masks.append(mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    replace_attention(monkeypatch, case, record)
    plain = run(transformer, inputs)
    assert any(not torch.equal(mask[0], mask[1]) for mask in masks), "the two samples should route differently"
    replay = iter(masks)
    replace_attention(
        monkeypatch, case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=next(replay))
    )
    assert_no_worse(ours, plain, run(*in_double(transformer, inputs)))


@pytest.mark.parametrize("impl", ["reference", "portable"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("gna", {"window": "full"}),
        ("sla", {"topk": 1.0, "block": 16}),
        ("sla", {"topk": 1.0, "block": 16, "order": "tile"}),
    ],
)
def test_keeping_every_pair_equals_dense(case, method, config, impl, model):
    transformer, inputs = model(case)
    dense, exact = run(transformer, inputs), run(*in_double(transformer, inputs))
    with dit_accel.accelerated(transformer, method, impl=impl, **config) as accel:
        ours = run(transformer, inputs)
    assert {layer.density for layer in accel.report().layers} == {1.0}
    assert {layer.kernels for layer in accel.report().layers} == {(impl,)}
    assert_no_worse(ours, dense, exact)


@pytest.mark.parametrize(
    ("method", "config", "case"),
    [
        ("tile", {"references": 5}, CASES[0]),
        ("tile", {"references": 1}, CASES[1]),
        ("radial", {}, CASES[1]),
        ("radial", {"decay": 1000.0}, CASES[0]),
        ("gna", {"window": (5, 7, 9)}, CASES[0]),
    ],
)
def test_keeping_every_pair_without_saying_so_is_refused(method, config, case, model):
    transformer, inputs = model(case)
    assert dit_accel.plan(method, case.grid, **config).density == 1
    with (
        dit_accel.accelerated(transformer, method, **config),
        pytest.raises(dit_accel.DitAccelError, match="keeps every"),
    ):
        run(transformer, inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_is_the_models_own_code(case, model):
    transformer, inputs = model(case)
    before = run(transformer, inputs)
    with dit_accel.accelerated(transformer, "dense") as accel:
        assert torch.equal(run(transformer, inputs), before)
    report = accel.report()
    assert (report.sparse_calls, report.dense_calls) == (0, len(report.layers))
    assert {tuple(layer.dense_reasons) for layer in report.layers} == {("method dense",)}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("setting", [{"dense_layers": 1.0}, {"dense_steps": 1.0}, {"dense_last_steps": 1.0}])
def test_dense_steps_and_layers_are_the_models_own_code(case, setting, model):
    transformer, inputs = model(case)
    before = run(transformer, inputs)
    with dit_accel.accelerated(transformer, "gna", window=(1, 3, 3), **setting) as accel:
        assert torch.equal(run(transformer, inputs), before)
    assert accel.report().sparse_calls == 0


def test_every_method_is_tested_here():
    tested = {method for method, _, _ in METHODS} | {"sla", "dense"}
    assert tested == set(get_methods())
    for method, config, _ in METHODS:
        make_config(method, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype(dtype, model, monkeypatch):
    case = CASES[0]
    transformer, inputs = model(case)
    transformer = transformer.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)) as accel:
        ours = run(transformer, inputs)
    assert ours.dtype == dtype and accel.report().sparse_calls == 2
    mask = dit_accel.plan("gna", case.grid, window=(3, 5, 4)).token_mask()
    replace_attention(monkeypatch, case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert_no_worse(ours, run(transformer, inputs), run(*in_double(transformer, inputs)))
