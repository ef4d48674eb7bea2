"""Accelerated transformers under `torch.compile(fullgraph=True)`, with the graphs counted."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel

CASES = {
    "wan": [
        ("gna", {"window": (3, 5, 4)}),
        ("sla", {"topk": 0.3, "block": 16}),
    ],
    "flux": [("gna", {"window": (1, 3, 3)}), ("sla", {"topk": 0.3, "block": 16})],
}


@pytest.fixture
def model(tiny_wan, tiny_flux, wan_inputs, flux_inputs):
    def make(family):
        if family == "wan":
            return tiny_wan(), wan_inputs()
        return tiny_flux(num_layers=1, num_single_layers=1), flux_inputs((13, 11))

    return make


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("family", CASES)
def test_through_accelerate_remove_and_accelerate_again(family, model):
    """Cold each time the settings change; the second accelerator must not see the first's plan."""
    transformer, inputs = model(family)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    dense = run(transformer, inputs)
    (method, first), *_ = CASES[family]
    second = {"window": (1, 5, 5)}
    wanted = []
    for config in (first, second):
        with dit_accel.accelerated(transformer, method, **config):
            wanted.append(run(transformer, inputs))
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3

    for config, eager in zip((first, second), wanted, strict=True):
        with dit_accel.accelerated(transformer, method, **config) as accel:
            before = counter.frame_count
            for _ in range(3):
                torch.testing.assert_close(run(compiled, inputs), eager)
            assert counter.frame_count - before <= 1
            assert {layer.sparse_calls for layer in accel.report().layers} == {3}
        before = counter.frame_count
        torch.testing.assert_close(run(compiled, inputs), dense)
        assert counter.frame_count - before <= 1


@pytest.mark.parametrize(("family", "method", "config"), [(f, *case) for f, cases in CASES.items() for case in cases])
def test_one_graph_and_a_second_for_dense_steps(family, method, config, model):
    transformer, inputs = model(family)
    dense = run(transformer, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    with dit_accel.accelerated(transformer, method, dense_steps=1, dense_last_steps=1, **config) as accel:
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        sparse, graphs = None, []
        for step in range(4):
            accel.set_step(step, 4)
            for _ in ("conditional", "unconditional"):
                result = run(compiled, inputs)
            if step in (0, 3):
                torch.testing.assert_close(result, dense)
            else:
                sparse = result
            graphs.append(counter.frame_count)
        assert graphs == [1, 2, 2, 2]
        accel.set_step(1, 4)
        torch.testing.assert_close(sparse, run(transformer, inputs))
        layers = accel.report().layers
    assert {(layer.sparse_calls, layer.dense_calls) for layer in layers} == {(5, 4)}
    assert layers[0].dense_reasons == {"dense_steps=1": 2, "dense_last_steps=1": 2}


def test_compiled_in_place_and_before(model):
    transformer, inputs = model("wan")
    counter = CompileCounterWithBackend("aot_eager")
    transformer.compile(backend=counter, fullgraph=True)
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)) as accel:
        compiled = run(transformer, inputs)
        transformer._compiled_call_impl = None
        torch.testing.assert_close(compiled, run(transformer, inputs))
    assert counter.frame_count == 1
    assert {layer.sparse_calls for layer in accel.report().layers} == {2}


def test_a_compiled_model_may_be_the_target(model):
    transformer, inputs = model("wan")
    compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
    with dit_accel.accelerated(compiled, "gna", window=(3, 5, 4)) as accel:
        run(compiled, inputs)
    assert list(accel.transformers.values()) == [transformer]
    assert accel.report().sparse_calls == 2


def test_repeated_blocks_share_their_graphs(tiny_wan, wan_inputs):
    """Four layers, one of them dense: one graph for sparse blocks and one for dense ones."""
    transformer, inputs = tiny_wan(layers=4), wan_inputs()
    counter = CompileCounterWithBackend("aot_eager")
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4), dense_layers=(1,), dense_steps=1) as accel:
        accel.set_step(1, 2)
        eager = run(transformer, inputs)
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        for step in (0, 1, 1):
            accel.set_step(step, 2)
            result = run(transformer, inputs)
        torch.testing.assert_close(result, eager)
        assert counter.frame_count == 2
    assert [layer.sparse_calls for layer in accel.report().layers] == [3, 0, 3, 3]
    assert [layer.dense_calls for layer in accel.report().layers] == [1, 4, 1, 1]


def test_two_resolutions_make_a_graph_each_at_most(model, wan_inputs):
    transformer, inputs = model("wan")
    other = wan_inputs(3, 10, 22)
    counter = CompileCounterWithBackend("aot_eager")
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)):
        wanted = [run(transformer, call) for call in (inputs, other)]
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        for _ in range(2):
            for call, eager in zip((inputs, other), wanted, strict=True):
                torch.testing.assert_close(run(compiled, call), eager)
    assert counter.frame_count <= 2


def test_many_accelerators_do_not_use_up_the_recompilations(model):
    """Dynamo gives up on a function after a few recompilations; coming and going must not count as such."""
    transformer, inputs = model("wan")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)):
            run(compiled, inputs)
    assert counter.frame_count <= 2


def test_a_step_schedule_on_a_bare_compiled_transformer_needs_set_step(model):
    transformer, inputs = model("wan")
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4), dense_steps=1) as accel:
        with pytest.raises(dit_accel.DitAccelError, match="set_step"):
            run(compiled, inputs)
        accel.set_step(0, 2)
        run(compiled, inputs)
        assert accel.report().dense_calls == 2


def test_gradients_through_a_compiled_model(model):
    transformer, inputs = model("wan")
    grads = []
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)):
        for call in (transformer, torch.compile(transformer, backend="aot_eager", fullgraph=True)):
            transformer.zero_grad()
            call(**inputs, return_dict=False)[0].square().mean().backward()
            grads.append(transformer.blocks[0].attn1.to_q.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_inductor(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(layers=1), wan_inputs()
    with dit_accel.accelerated(transformer, "gna", window=(3, 5, 4)):
        eager = run(transformer, inputs)
        compiled = torch.compile(transformer, fullgraph=True)
        torch.testing.assert_close(run(compiled, inputs), eager, rtol=1e-4, atol=1e-5)
