"""What every family must do, on every model in `models/`: each check is a column of the documentation's table."""

import dataclasses
import functools

import pytest
import torch
from accelerated_runs import FIRST, UNTUNED, each_run, in_turn, train
from masked_reference import assert_no_worse, listed_pairs, plain_and_exact, static_pairs
from method_settings import in_models
from tiny_models import all_models, run
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.plans.routed import RoutedPlan
from dit_accel.registry import get_families, get_methods

MODELS = all_models()
SETTINGS = in_models()
SLA = SETTINGS["sla"]
# Methods that attend to what they list and to nothing else, untrained
ROUTED = {"sla": SLA, "sol": {"tail": "none", "tau": 0.5, "block": 8, "block_q": 8}, "sparge": SETTINGS["sparge"]}
# Methods of which every setting here is a mask; scaledit's windows are gna's, and its tests have its anchors.
MASKS = {"gna", "radial", "tile", "clear", "scaledit", "sla", "sparge"}
# The others have a tail besides, or heads that differ.
DEFINED = {name: settings for name, settings in SETTINGS.items() if name not in MASKS}


def static_settings(tiny):
    """Static methods and settings that leave something out on the model's grid."""
    if not tiny.video:
        dilated = ("gna", {"window": (1, 3, 3), "dilation": (1, 2, 2)})
        return [("gna", {"window": (1, 5, 4)}), dilated, ("clear", {"radius": 3})]
    return [
        ("gna", {"window": (3, 5, 4)}),
        ("radial", {"decay": 0.2, "sink": False}),
        ("radial", {"decay": 0.2, "rule": "released", "block": 16, "sink": False}),
        ("tile", {"references": 1}),
    ]


def every_setting():
    for tiny in MODELS:
        for method, config in static_settings(tiny):
            # The published code of radial attends whole blocks: none of them is partial.
            whole = config.get("rule") == "released"
            check = pytest.mark.check("exact in whole blocks" if whole else "exact")
            last = list(config.values())[1] if len(config) > 1 else next(iter(config.values()))
            name = f"{tiny}-{method}-{last}".replace(" ", "")
            yield pytest.param(tiny, method, config, whole, id=name, marks=check)


def every_pair():
    """Settings that leave nothing out."""
    for tiny in MODELS:
        settings = {"gna": {"window": "full"}, "sla": {"topk": 1.0, "block": 16}}
        if str(tiny) in UNTUNED:
            settings |= {"sol": {"tau": -1e6}, "sparge": {"topk": 1.0, "order": "tile"}, "rectified": {"drop": 0.0}}
            settings |= {"moh": {"shared": 0.5, "routed": 0.5}}
        yield from ((tiny, method, config) for method, config in settings.items())


def each_model(models=MODELS):
    return pytest.mark.parametrize("tiny", models, ids=str)


def state_of(transformer):
    """What `remove` must restore: processors, hooks, weights by name, attributes."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    modules = dict(transformer.named_modules())
    return {
        "processors": {name: id(getattr(module, "processor", None)) for name, module in modules.items()},
        "hooks": [(name, hook, list(getattr(module, hook))) for name, module in modules.items() for hook in hooks],
        "weights": list(transformer.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


def test_every_family_and_method_is_checked():
    assert {tiny.family for tiny in MODELS} == set(get_families())
    tested = {method for tiny in MODELS for method, _ in static_settings(tiny)}
    assert tested | {*ROUTED, *DEFINED, "dense", "scaledit"} == set(get_methods())
    assert len({str(tiny) for tiny in MODELS}) == len(MODELS)


@pytest.mark.check("method dense", method="dense")
@each_model()
def test_dense_is_the_models_own_code(tiny):
    with dit_accel.accelerated(tiny.shared, "dense") as accel:
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
    report = accel.report()
    assert (report.sparse_calls, report.dense_calls) == (0, len(report.layers))


@pytest.mark.parametrize(("tiny", "method", "config", "whole"), list(every_setting()))
def test_equals_masked_attention(tiny, method, config, whole, evidence):
    """At the expected grid; with sparse calls only, partial blocks and a density under 0.9."""
    with dit_accel.accelerated(tiny.shared, method, **config) as accel:
        sparse = run(tiny.shared, tiny.call())
    report, plan = accel.report(), dit_accel.plan(method, tiny.grid, **config)
    visual = dit_accel.plan(method, dataclasses.replace(tiny.grid, text=0, conditioning=0), **config)
    family = get_families()[tiny.family]
    plans = {layer.name: plan if family.sees_text(layer.name) else visual for layer in report.layers}
    assert report.grids == {str(its_plan.grid): its_plan.density for its_plan in plans.values()}
    assert report.dense_calls == 0
    assert all(layer.sparse_calls == 1 and layer.density == plans[layer.name].density < 0.9 for layer in report.layers)
    if not whole:
        assert plan.block_mask().partial.any()
        evidence(report)

    plain, exact = plain_and_exact(tiny, static_pairs(plan.token_mask(), tiny.rows, visual.token_mask()))
    assert_no_worse(sparse, plain, exact, tiny.coarsest)
    assert (sparse - tiny.dense).abs().max() > 100 * (sparse - plain).abs().max(), "the mask makes no difference here"


@pytest.mark.check("exact")
@pytest.mark.parametrize(
    ("tiny", "method", "config"),
    in_turn([(tiny, *item) for tiny in MODELS for item in ROUTED.items()], lambda tiny, method, config: method),
)
def test_untrained_routed_methods_equal_masked_attention_on_their_lists(tiny, method, config, evidence):
    with dit_accel.accelerated(tiny.shared, method, **config) as accel:
        sparse = run(tiny.shared, tiny.call())
    assert {layer.sparse_calls for layer in accel.report().layers} == {1}
    evidence(accel.report())
    plain, exact = plain_and_exact(tiny, listed_pairs(method, tiny.grid, config, tiny.rows))
    assert_no_worse(sparse, plain, exact, tiny.coarsest)
    assert (sparse - tiny.dense).abs().max() > 100 * (sparse - plain).abs().max(), "the routing changes nothing here"


def every_definition():
    """`rectified` in every family, as `sol` without its tail is."""
    for tiny in MODELS:
        for method in DEFINED if str(tiny) in UNTUNED else ["rectified"] if tiny in FIRST else []:
            yield pytest.param(tiny, method, DEFINED[method], id=f"{tiny}-{method}")


@pytest.mark.check("exact")
@pytest.mark.parametrize(("tiny", "method", "config"), list(every_definition()))
def test_methods_that_are_more_than_a_mask_equal_their_definition(tiny, method, config, evidence, monkeypatch):
    """The reference implementations in fp64 and, as plain PyTorch, in fp32."""
    attend = RoutedPlan.run

    def in_double(plan, q, k, v, call):
        return attend(plan, q.double(), k.double(), v.double(), call).to(q.dtype)

    with dit_accel.accelerated(tiny.shared, method, **config) as accel:
        sparse = run(tiny.shared, tiny.call())
    evidence(accel.report())
    with dit_accel.accelerated(tiny.shared, method, impl="reference", **config):
        plain = run(tiny.shared, tiny.call())
    if not tiny.doubles:  # then attention alone is exact
        monkeypatch.setattr(RoutedPlan, "run", in_double)
    with dit_accel.accelerated(tiny.shared_double, method, impl="reference", **config):
        exact = run(tiny.shared_double, tiny.double_call())
    assert_no_worse(sparse, plain, exact, tiny.coarsest)
    assert (sparse - tiny.dense).abs().max() > 100 * (sparse - plain).abs().max(), "it makes no difference here"


@pytest.mark.check("keeping every pair equals dense")
@pytest.mark.parametrize(("tiny", "method", "config"), in_turn(every_pair(), lambda tiny, method, config: method))
def test_keeping_every_pair_equals_dense(tiny, method, config):
    with dit_accel.accelerated(tiny.shared, method, **config) as accel:
        sparse = run(tiny.shared, tiny.call())
    assert {layer.density for layer in accel.report().layers} == {1.0}
    _, exact = plain_and_exact(tiny, lambda q, k, v: torch.ones(1, 1, dtype=torch.bool))
    assert_no_worse(sparse, tiny.dense, exact, tiny.coarsest)


@pytest.mark.check("removable")
@pytest.mark.parametrize(
    ("tiny", "method", "config"),
    in_turn(
        [(tiny, *item) for tiny in MODELS for item in (("gna", {"window": 1}), ("sla", SLA))],
        lambda tiny, method, config: method,
    ),
)
def test_remove_restores_everything(tiny, method, config, evidence):
    before = state_of(tiny.shared)
    accel = dit_accel.accelerate(tiny.shared, method, **config)
    assert state_of(tiny.shared) != before
    run(tiny.shared, tiny.call())
    evidence(accel.report())
    assert accel.remove() == []
    assert state_of(tiny.shared) == before
    assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)


@pytest.mark.check("other attention untouched", method="gna")
@each_model()
def test_other_attention_is_untouched(tiny):
    """Cross-attention, refiners and audio keep their own processors: each module's is as before or one of ours."""
    before = {name: getattr(module, "processor", None) for name, module in tiny.shared.named_modules()}
    visual = {name for name, _ in get_families()[tiny.family].attentions(tiny.shared)}
    with dit_accel.accelerated(tiny.shared, "gna", window=1):
        changed = {
            name
            for name, module in tiny.shared.named_modules()
            if getattr(module, "processor", None) is not before[name]
        }
    assert changed == visual


@pytest.mark.check("compile")
@each_run([tiny for tiny in FIRST if tiny.compiles != "no"])
def test_compiles_as_one_graph(tiny, method, config, evidence):
    """Or, block by block, as the graphs that the untouched model has: refiners of the same class have their own."""
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, method, **config) as accel:
        train(accel)
        eager = run(transformer, tiny.call())
        compiled, graphs = _compile(transformer, tiny)
        torch.testing.assert_close(compiled, eager)
        assert graphs == (1 if tiny.compiles == "whole" else _stock_graphs(tiny))
    assert {layer.sparse_calls for layer in accel.report().layers} == {3}
    evidence(accel.report())


@functools.cache
def _stock_graphs(tiny):
    return _compile(tiny.build(), tiny)[1]


def _compile(transformer, tiny):
    """What a compiled transformer answers to the second of two calls, and how many graphs were made."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    if tiny.compiles == "whole":
        transformer = torch.compile(transformer, backend=counter, fullgraph=True)
    else:
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    outputs = [run(transformer, tiny.call()) for _ in range(2)]
    torch._dynamo.reset()
    return outputs[1], counter.frame_count
