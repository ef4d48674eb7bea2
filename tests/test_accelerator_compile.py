"""Accelerated transformers under `torch.compile(fullgraph=True)`, with the graphs counted."""

import accelerated_runs
import pytest
import tiny_models
import torch
from messages import names
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel.methods.proxy import HiddenGate
from dit_accel.pipelines import attention

CASES = {
    "wan": [
        ("gna", {"window": (3, 5, 4)}),
        ("sla", {"topk": 0.3, "block": 16}),
        ("sol", {"block": 8, "block_q": 8}),
    ],
    "flux": [("gna", {"window": (1, 3, 3)}), ("sla", {"topk": 0.3, "block": 16})],
}


@pytest.fixture
def model(tiny_wan, tiny_flux, wan_inputs, flux_inputs):
    """A transformer and its call. One layer of each kind unless a test is about several: compiling costs by layers."""

    def make(family, layers=1):
        if family == "wan":
            return tiny_wan(layers), wan_inputs()
        return tiny_flux(num_layers=1, num_single_layers=1), flux_inputs((13, 11))

    return make


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("family", CASES)
def test_through_accelerate_remove_and_accelerate_again(family, model):
    """Cold each time the settings change; the second accelerator must not see the first's plan."""
    transformer, inputs = model(family)
    counter = CompileCounterWithBackend("eager")
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


@pytest.mark.parametrize(
    ("family", "method", "config"),
    [
        pytest.param(family, *case, marks=[pytest.mark.thorough] if (family, case[0]) == ("flux", "gna") else [])
        for family, cases in CASES.items()
        for case in cases
    ],
)
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
    transformer, inputs = model("wan", layers=2)
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
    assert accel.report().sparse_calls == 1


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
        with pytest.raises(dit_accel.DitAccelError, match=names("set_step")):
            run(compiled, inputs)
        accel.set_step(0, 2)
        run(compiled, inputs)
        assert accel.report().dense_calls == 1


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


SIZES = [(5, 14, 18), (3, 14, 18), (5, 10, 22), (4, 12, 12), (6, 8, 20), (3, 20, 10)]
SIZES += [(4, 18, 14), (5, 16, 14), (7, 10, 10), (4, 14, 22), (6, 12, 16)]
IMAGES = [(13, 11), (11, 13), (9, 16), (16, 9), (12, 12), (10, 14), (8, 19), (17, 7), (15, 10), (14, 9), (12, 15)]
PART = {"window": (0.5, 0.7, 0.5)}
MANY_SIZES = [
    # family, method, settings, what compiles, backend, dynamic, gradients
    ("wan", "radial", {"decay": 0.2, "sink": False}, "blocks", "aot_eager", None, False),
    pytest.param("wan", "tile", {"references": 1}, "blocks", "aot_eager", True, False, marks=pytest.mark.thorough),
    ("wan", "sla", {"topk": 0.3, "block": 16}, "whole", "aot_eager", True, True),
    pytest.param(
        "wan", "sla", {"topk": 0.3, "block": 16}, "blocks", "inductor", True, True, marks=pytest.mark.thorough
    ),
    pytest.param("wan", "gna", PART, "whole", "inductor", None, False, marks=pytest.mark.thorough),
    ("flux", "sparge", {"topk": 0.3, "block": 16, "block_q": 16}, "whole", "aot_eager", True, False),
    ("minimax_h3", "rectified", {"block": 16, "block_q": 16}, "whole", "aot_eager", True, False),
    pytest.param(
        "hunyuan_video",
        "sol",
        {"block": 16, "block_q": 16},
        "whole",
        "aot_eager",
        True,
        False,
        marks=pytest.mark.thorough,
    ),
]


def calls_of_many_sizes(family, **config):
    module = tiny_models.module(family)
    if family == "flux":
        return module.build(num_layers=1, num_single_layers=1), [module.inputs(size) for size in IMAGES]
    transformer = module.build(**config)
    if family == "minimax_h3":
        return transformer, [module.inputs(module.layout(latent=size)) for size in SIZES]
    call = module.inputs()
    batch, channels = call["hidden_states"].shape[:2]
    return transformer, [call | {"hidden_states": tiny_models.numbers()(batch, channels, *size)} for size in SIZES]


def outcome(call, transformer, inputs, gradients):
    """The output, or the gradients of all weights, learned ones too."""
    if not gradients:
        return run(call, inputs)
    transformer.zero_grad()
    call(**inputs, return_dict=False)[0].square().mean().backward()
    weight_gradients = {name: weight.grad for name, weight in transformer.named_parameters() if weight.grad is not None}
    assert any("to_q" in name for name in weight_gradients)
    return weight_gradients


@pytest.mark.parametrize(("family", "method", "config", "part", "backend", "dynamic", "gradients"), MANY_SIZES)
def test_eleven_sizes_share_their_graphs(family, method, config, part, backend, dynamic, gradients):
    """As many graphs as the untouched model has; that is, three at most for each of its parts."""
    one_layer = {"num_layers": 1} if part == "whole" else {}  # the time to compile goes by layers
    transformer, calls = calls_of_many_sizes(family, **one_layer)
    counter = CompileCounterWithBackend(backend)
    with dit_accel.accelerated(transformer, method, **config) as accel:
        accelerated_runs.train(accel)
        wanted = [outcome(transformer, transformer, inputs, gradients) for inputs in calls]
        compiled = transformer
        if part == "whole":
            compiled = torch.compile(transformer, backend=counter, fullgraph=True, dynamic=dynamic)
        else:
            transformer.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=dynamic)
        for inputs, eager in zip(calls, wanted, strict=True):
            result = outcome(compiled, transformer, inputs, gradients)
            torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5)
        layers = accel.report().layers
    assert counter.frame_count <= 3
    assert {(layer.sparse_calls, layer.dense_calls) for layer in layers} == {(2 * len(calls), 0)}
    if method == "sla" and gradients:
        assert any("sparse_linear" in name for name in eager)


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
def test_repeated_blocks_make_no_more_graphs_than_the_untouched_models(family):
    """At each of the first four sizes. These models have several kinds of blocks, so they make more than three."""

    def graphs(transformer):
        counter, counts = CompileCounterWithBackend("eager"), []
        torch._dynamo.reset()
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        for inputs in calls[:4]:
            run(transformer, inputs)
            counts.append(counter.frame_count)
        return counts

    transformer, calls = calls_of_many_sizes(family)
    dense = graphs(transformer)
    transformer, _ = calls_of_many_sizes(family)
    with dit_accel.accelerated(transformer, "gna", **PART) as accel:
        sparse = graphs(transformer)
        assert {layer.sparse_calls for layer in accel.report().layers} == {4}
    assert dense[-1] == dense[-2] > 3
    assert all(accelerated <= untouched for accelerated, untouched in zip(sparse, dense, strict=True))


def test_lora_adapters_are_swapped_without_a_new_graph(tiny_wan, wan_inputs):
    """As Diffusers' hot-swapping does it; both sizes of both adapters run in the graphs of the first."""
    counter, target = CompileCounterWithBackend("eager"), ["to_q", "to_v"]
    states = []
    for seed in (0, 1):
        adapted = tiny_wan(layers=1)
        adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=target), adapter_name="first")
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        states.append({k: v.clone() for k, v in get_peft_model_state_dict(adapted, adapter_name="first").items()})
    transformer = tiny_wan(layers=1)
    calls = [wan_inputs(), wan_inputs(3, 10, 22)]
    with dit_accel.accelerated(transformer, "gna", **PART):
        transformer.enable_lora_hotswap(target_rank=4)
        transformer.load_lora_adapter(states[0], prefix=None, adapter_name="first")
        compiled = torch.compile(transformer, backend=counter, fullgraph=True, dynamic=True)
        seen = [run(compiled, inputs) for inputs in calls]
        graphs = counter.frame_count
        transformer.load_lora_adapter(states[1], prefix=None, adapter_name="first", hotswap=True)
        swapped = [run(compiled, inputs) for inputs in calls]
        assert counter.frame_count == graphs <= 3
        for before, after, inputs in zip(seen, swapped, calls, strict=True):
            assert (before - after).abs().max() > 1e-3
            torch.testing.assert_close(after, run(transformer, inputs))


def test_a_backward_pass_after_another_forward(model):
    """Each forward keeps a record of its own; records go with the graphs that they belong to."""
    transformer, inputs = model("wan")
    other = {name: value + 1 if name == "hidden_states" else value for name, value in inputs.items()}

    def gradients(call):
        transformer.zero_grad()
        first, second = (call(**arguments, return_dict=False)[0].square().mean() for arguments in (inputs, other))
        first.backward(retain_graph=True)
        first.backward()
        (second * 2).backward()
        return transformer.blocks[0].attn1.to_q.weight.grad.clone()

    with dit_accel.accelerated(transformer, "gna", **PART):
        compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled), gradients(transformer))
        assert not attention._RECORDS
        output = compiled(**inputs, return_dict=False)[0]
        assert len(attention._RECORDS) == 1
        del output
        assert not attention._RECORDS


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_passes_opcheck(gated):
    """With the gate of hidden states and without."""
    grid = dit_accel.TokenGrid(3, 4, 5)
    state = attention.CallState("portable")
    layer = attention.LayerAttention(state)
    if gated:
        state.set(dit_accel.plan("proxy", grid, gate="hidden", block=8))
        layer.take_learned(HiddenGate(24, 8, 3))
    else:
        state.set(dit_accel.plan("gna", grid, window=3))
    for gradients in (False, True):
        q, k, v = (torch.randn(2, 60, 3, 8, requires_grad=gradients).transpose(1, 2) for _ in range(3))
        gates = [torch.randn(2, 60, 24, requires_grad=gradients)] if gated else []
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(
            attention.planned_attention,
            (q, k, v, layer.key, gates, [], None, False, False, gradients),
            test_utils=tests,
        )


def test_a_compiled_model_whose_accelerator_is_gone():
    layer = attention.LayerAttention(attention.CallState())
    key = layer.key
    del layer
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(dit_accel.DitAccelError, match=names("accelerator")):
        attention.planned_attention(q, q, q, key, [], [], None, False, False, False)


@pytest.mark.parametrize(("family", "id", "strict"), [("wan", "t2v", True), ("flux", "chroma", False)])
def test_export(family, id, strict):
    """It attends as the call before it, whose grid and text were read from values; export itself has none."""
    tiny = tiny_models.get(family, id)
    transformer, inputs = tiny.build(), tiny.call() | {"return_dict": False}
    with torch.no_grad(), dit_accel.accelerated(transformer, "gna", window=(1, 5, 4)) as accel:
        with pytest.raises(dit_accel.DitAccelError, match=r"^An exported .*, and there was none\.[^\n]*\n?$"):
            torch.export.export(transformer, (), inputs, strict=strict)
        eager = transformer(**inputs)[0]
        exported = torch.export.export(transformer, (), inputs, strict=strict)
        assert {layer.sparse_calls for layer in accel.report().layers} == {1}
        torch.testing.assert_close(exported.module()(**inputs)[0], eager)
    operators = {str(node.target) for node in exported.graph.nodes}
    assert "dit_accel.planned_attention.default" in operators
