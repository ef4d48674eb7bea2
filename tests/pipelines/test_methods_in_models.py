"""More settings than `test_conformance` has time for: a video model, an image model and one with reference tokens."""

import pytest
import tiny_models
import torch
from masked_reference import MaskedAttention, assert_no_worse, listed_pairs, plain_and_exact, static_pairs
from messages import names
from tiny_models import run

import dit_accel

WAN, FLUX, KONTEXT = (tiny_models.get(*name) for name in (("wan", "t2v"), ("flux", "t2i"), ("flux", "kontext")))
MODELS = [WAN, FLUX, KONTEXT]
over_models = pytest.mark.parametrize("tiny", MODELS, ids=str)


@over_models
def test_strided_and_causal_windows_equal_masked_attention(tiny):
    config = {"window": 0.5, "stride": 2, "causal": (True, False, False)}
    with dit_accel.accelerated(tiny.shared, "gna", **config) as accel:
        sparse = run(tiny.shared, tiny.call())
    plan = dit_accel.plan("gna", tiny.grid, **config)
    assert accel.report().grids == {str(tiny.grid): plan.density} and plan.density < 0.9
    assert plan.pairs == int(plan.token_mask().sum())
    assert_no_worse(sparse, *plain_and_exact(tiny, static_pairs(plan.token_mask())))


@over_models
def test_untrained_sla_in_tiles_equals_masked_attention_on_its_critical_blocks(tiny):
    config = {"topk": 0.35, "block": 16, "order": "tile"}
    with dit_accel.accelerated(tiny.shared, "sla", **config):
        sparse = run(tiny.shared, tiny.call())
    masks = []

    def record(q, k, v):
        masks.append(listed_pairs("sla", tiny.grid, config)(q, k, v))
        return masks[-1]

    assert_no_worse(sparse, *plain_and_exact(tiny, record))
    assert any(not torch.equal(mask[0], mask[1]) for mask in masks), "the two samples should route differently"


@pytest.mark.parametrize("config", [("gna", {"window": "full"}), ("sla", {"topk": 1.0, "order": "tile"})], ids=str)
@over_models
def test_keeping_every_pair_equals_dense_in_the_reference_too(tiny, config):
    method, settings = config
    with dit_accel.accelerated(tiny.shared, method, impl="reference", **settings) as accel:
        sparse = run(tiny.shared, tiny.call())
    assert {tuple(layer.kernels) for layer in accel.report().layers} == {("reference",)}
    assert_no_worse(sparse, tiny.dense, run(tiny.shared_double, tiny.call(dtype=torch.float64)))


@pytest.mark.parametrize(
    ("method", "config", "tiny"),
    [
        ("tile", {"references": 5}, WAN),
        ("tile", {"references": 1}, FLUX),
        ("radial", {}, FLUX),
        ("clear", {"radius": 100}, FLUX),
        ("radial", {"decay": 1000.0}, WAN),
        ("gna", {"window": (5, 7, 9)}, WAN),
    ],
)
def test_keeping_every_pair_without_saying_so_is_refused(method, config, tiny):
    assert dit_accel.plan(method, tiny.grid, **config).density == 1
    with (
        dit_accel.accelerated(tiny.shared, method, **config),
        pytest.raises(dit_accel.DitAccelError, match=names("pair grid")),
    ):
        run(tiny.shared, tiny.call())


@over_models
@pytest.mark.parametrize("setting", [{"dense_layers": 1.0}, {"dense_steps": 1.0}, {"dense_last_steps": 1.0}])
def test_dense_steps_and_layers_are_the_models_own_code(tiny, setting):
    with dit_accel.accelerated(tiny.shared, "gna", window=(1, 3, 3), **setting) as accel:
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
    assert accel.report().sparse_calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype(dtype):
    transformer, inputs = WAN.build().to(dtype), WAN.call(dtype=dtype)
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)) as accel:
        sparse = run(transformer, inputs)
    assert sparse.dtype == dtype and accel.report().sparse_calls == 2
    pairs = static_pairs(dit_accel.plan("gna", WAN.grid, window=(3, 5, 4)).token_mask())
    with MaskedAttention(WAN, pairs):
        plain, exact = run(transformer, inputs), run(WAN.shared_double, WAN.call(dtype=torch.float64))
    assert_no_worse(sparse, plain, exact)
