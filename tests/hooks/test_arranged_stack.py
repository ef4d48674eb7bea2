"""Tokens permuted once before a run of sparse layers, against permuting q, k and v in each layer."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
from accelerated_runs import train
from accelerated_state import state_of
from accuracy import assert_accurate
from arranged_stacks import (
    BUILD,
    SETTINGS,
    SOL,
    TINY,
    Gathers,
    accelerated,
    call_of,
    of_steps,
    over_families,
    where,
)
from tiny_models import cast, get, module, run

import dit_accel
from dit_accel.generation.finite import find_place
from dit_accel.generation.sampling import attention_time
from dit_accel.method import MethodConfig
from dit_accel.pipelines.targets import find_transformers
from dit_accel.plans.routed import RoutedPlan
from dit_accel.train.networks import TrainingNetworks


@pytest.mark.parametrize("method", SETTINGS)
@over_families
def test_bits_are_those_of_layers_that_permute(family, method, in_each_layer):
    transformer, call = BUILD[family](), call_of(family)
    ways = []

    def work():
        with dit_accel.accelerated(transformer, method, **SETTINGS[method]) as accel:
            train(accel)
            ways.append((run(transformer, call), where(accel)))
            return ways[-1][0]

    assert torch.equal(*in_each_layer(work))
    assert [way for _, way in ways] == [[{"stack"}] * 4, [{"layer"}] * 4]
    with dit_accel.accelerated(transformer, method, **SETTINGS[method] | {"order": "raster"}) as accel:
        assert not torch.equal(run(transformer, call), ways[0][0])
        assert where(accel) == [set()] * 4


# tensors of a call with a row for each token: rotary tables, and MiniMax-H3's noise levels
BY_TOKEN = {"wan": 2, "chronoedit": 2, "hunyuan_video": 2, "ltx": 2, "minimax_h3": 3}


@pytest.mark.parametrize("training", [False, True])
@over_families
def test_gathers_of_a_call(family, training, in_each_layer):
    """The visual stream there and back, and each tensor with a row for each token once; not four in each layer.

    In training, too, where the blocks alone train.
    """
    transformer, call = BUILD[family](), call_of(family)
    for name, weight in transformer.named_parameters():
        weight.requires_grad_("blocks." in name)
    grid = get(*TINY[family]).grid

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL), Gathers({grid.tokens, grid.visual}) as gathers:
            assert transformer(**call)[0].requires_grad if training else run(transformer, call).numel()
        return len(gathers.shapes)

    arranged, in_layers = in_each_layer(work)
    assert in_layers - arranged == 4 * 4 - (2 + BY_TOKEN[family])


@pytest.mark.parametrize("ends", ["well", "in an error", "in a recomputation"])
def test_nothing_is_copied_for_longer_than_a_call(ends):
    """Positions, of which every block of the run gets the same copy."""
    transformer, call, positions = module("wan").build(layers=3).train(), call_of("wan"), []
    transformer.enable_gradient_checkpointing()
    attend = transformer.blocks[1].attn1.forward

    def watched(hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        positions.append(weakref.ref(rotary_emb[0]))
        if ends == "in an error":
            raise KeyError
        return attend(hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    transformer.blocks[1].attn1.forward = watched
    with dit_accel.accelerated(transformer, "sol", **SOL):
        with contextlib.suppress(KeyError), torch.set_grad_enabled(ends == "in a recomputation"):
            out = transformer(**call)[0]
            if ends == "in a recomputation":
                out.square().mean().backward()
            del out
        gc.collect()
        assert len(positions) == (2 if ends == "in a recomputation" else 1)
        assert [position() for position in positions] == [None] * len(positions)


def test_rows_are_no_inference_tensors():
    """On devices other than the one that plans: a training run after it saves them for its backward pass."""
    transformer, call = module("wan").build(layers=2), call_of("wan")
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel, torch.inference_mode():
        run(transformer, call)
        (engine,) = accel._engines
        layout = types.SimpleNamespace(grid=get("wan", "t2v").grid, rows=None)
        engine._arranged.begin(layout, torch.device("meta"), engine._last)
        rows = [part for block in engine._arranged._blocks for part in block.rows]
    assert [part.device.type for part in rows] == ["meta"] * 4 and not any(part.is_inference() for part in rows)


def test_settings_without_a_field_for_their_curve(monkeypatch):
    transformer = module("wan").build(layers=2)
    monkeypatch.setattr(MethodConfig, "curve", None)
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        run(transformer, call_of("wan"))
        assert where(accel) == [{"layer"}] * 2
        assert [note for note in accel.report().notes if "order" in note]


def test_dense_layers_are_in_no_run(in_each_layer):
    """Layer 2 is dense: two runs. The model's own code sees its tokens in its own order."""
    transformer, call = module("wan").build(layers=5), call_of("wan")
    seen = []
    transformer.blocks[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))

    def work():
        with (
            dit_accel.accelerated(transformer, "sol", dense_layers=(2,), **SOL) as accel,
            Gathers({315}) as gathers,
        ):
            out = run(transformer, call)
        ways.append(where(accel))
        counts.append(len(gathers.shapes))
        return out

    ways, counts = [], []
    assert torch.equal(*in_each_layer(work)) and torch.equal(*seen)
    assert ways[0] == [{"stack"}, {"stack"}, set(), {"stack"}, {"stack"}]
    assert counts == [2 * (2 + 2), 4 * 4]


def test_layers_with_different_curves_and_methods(in_each_layer):
    transformer, call = module("wan").build(layers=6), call_of("wan")
    setting = dit_accel.Setting.make("sol", SOL)
    layers = [{"order": order} for order in ("morton", "morton", "hilbert", "raster", "hilbert", "hilbert")]
    record = setting.as_dict()
    record.pop("config")
    record["layers"] = {"transformer": [SOL | layer for layer in layers]}
    setting = dit_accel.Setting.from_dict(record)
    ways = []

    def work():
        with dit_accel.accelerated(transformer, setting) as accel:
            out = run(transformer, call)
            ways.append(where(accel))
        return out

    assert torch.equal(*in_each_layer(work))
    assert ways[0] == [{"stack"}] * 3 + [set()] + [{"stack"}] * 2


def test_dense_steps_and_paused_runs_are_the_models_own(in_each_layer):
    transformer, tiny = module("wan").build(layers=4), get("wan", "t2v")
    plain = run(transformer, tiny.call())
    before = state_of(transformer)
    accel = dit_accel.accelerate(transformer, "sol", dense_steps=1, **SOL)
    with Gathers({315}) as gathers:
        accel.set_step(0, 3)
        assert torch.equal(run(transformer, tiny.call()), plain)
        assert not gathers.shapes
        accel.set_step(1, 3)
        sparse = run(transformer, tiny.call())
        assert len(gathers.shapes) == 4 and not torch.equal(sparse, plain)
        with accel.paused():
            assert torch.equal(run(transformer, tiny.call()), plain)
        accel.set_step(0, 3)
        assert torch.equal(run(transformer, tiny.call()), plain)
        assert len(gathers.shapes) == 4
    accel.remove()
    assert state_of(transformer) == before and torch.equal(run(transformer, tiny.call()), plain)


@pytest.mark.parametrize("name", ["wan:vace", "wan:animate", "hunyuan_video:i2v", "ltx:condition", "cogvideox:1.0"])
def test_where_layers_permute_their_own(name, in_each_layer):
    tiny = get(*name.split(":"))
    transformer, ways = tiny.build(), []

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
            out = run(transformer, tiny.call())
            ways.append({place for layer in where(accel) for place in layer})
            notes = [note for note in accel.report().notes if "permuted" in note]
        return out, notes

    (out, notes), (other, _) = in_each_layer(work)
    assert torch.equal(out, other) and ways == [{"layer"}, {"layer"}] and len(notes) == 1


def test_a_timestep_for_each_token(in_each_layer):
    """Wan 2.2's TI2V: the modulation has a row for each token."""
    transformer, call = module("wan").build(layers=3), call_of("wan")
    times = torch.full((2, 315), 500)
    times[:, :63] = 0
    (out, ways), (other, _) = in_each_layer(lambda: accelerated(transformer, call | {"timestep": times}))
    assert torch.equal(out, other) and ways == {"stack"}
    assert not torch.equal(out, accelerated(transformer, call)[0])


def test_a_timestep_for_each_token_of_ltx(in_each_layer):
    transformer, call = BUILD["ltx"](), call_of("ltx")
    times = torch.full((2, 315), 500.0)
    times[:, :63] = 0
    (out, ways), (other, _) = in_each_layer(lambda: accelerated(transformer, call | {"timestep": times}))
    assert torch.equal(out, other) and ways == {"stack"}
    assert not torch.equal(out, accelerated(transformer, call)[0])


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_in_a_block_see_the_models_order(kind, in_each_layer):
    """Of its modules, too. The block is in no run, and the others are in runs around it."""
    transformer, call = module("wan").build(layers=4), call_of("wan")
    seen = []

    def hook(part, *values):
        seen.append(values[-1][0] if isinstance(values[-1], tuple) else values[-1])

    getattr(transformer.blocks[1].ffn, f"register_{kind}")(hook)

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
            transformer(**call, return_dict=False)[0].square().mean().backward()
            ways.append(where(accel))
            notes.append([note for note in accel.report().notes if "hooks" in note])

    ways, notes = [], []
    in_each_layer(work)
    assert len(seen) == 2 and torch.equal(*seen)
    assert ways == [[{"stack"}, {"layer"}, {"stack"}, {"stack"}], [{"layer"}] * 4]
    assert list(map(len, notes)) == [1, 0]


def test_training_compares_tokens_with_the_teachers(in_each_layer):
    """The objective `attention`: what the student's layer returns, in the order of the dense teacher's."""
    transformer, call = module("wan").build(layers=3), call_of("wan")
    family = find_transformers(transformer)[0]["transformer"][1]
    noisy, timestep = call.pop("hidden_states"), call.pop("timestep")

    def work():
        with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
            networks = TrainingNetworks(transformer, family, accel, lora=False, layers=(1,))
            with torch.no_grad():
                student = networks.outputs(transformer, noisy, timestep, call)
                teacher = networks.teacher(noisy, timestep, call)
            networks.close()
            ways.append(where(accel))
        assert student.attention[0].shape == teacher.attention[0].shape
        return student.attention[0]

    ways = []
    assert torch.equal(*in_each_layer(work))
    assert ways[0] == [{"stack"}, {"layer"}, {"stack"}]


def test_hooks_that_read_no_tokens_do_not_count():
    """The clock of `eval` among them, and the search for values that are not finite, which have no order."""
    transformer, call = module("wan").build(layers=3), call_of("wan")
    pipe = types.SimpleNamespace(components={"transformer": transformer})
    with dit_accel.accelerated(transformer, "sol", **SOL) as accel:
        with attention_time(pipe, torch.device("cpu")) as watch:
            run(transformer, call)
        assert watch.seconds > 0
        transformer.blocks[1].attn1.to_q.weight.data[0, 0] = torch.nan
        assert "blocks.1.attn1.to_q" in find_place(pipe, lambda: run(transformer, call))
        assert where(accel) == [{"stack"}] * 3


def grads_of(transformer, call):
    """Gradients of all weights."""
    transformer.zero_grad()
    transformer(**call, return_dict=False)[0].square().mean().backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@over_families
def test_gradients(family, checkpointing, in_each_layer, monkeypatch):
    """Sums over tokens are in another order: at most twice as far from float64 as where layers permute."""
    transformer = BUILD[family]().train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    blocks, add_density = [], RoutedPlan.add_density

    def record(plan, lists, density_sum):
        blocks[-1].append(lists.map(lists.used, plan.key_order.visual_blocks))
        add_density(plan, lists, density_sum)

    monkeypatch.setattr(RoutedPlan, "add_density", record)

    def work(dtype=torch.float32):
        wanted, call = copy.deepcopy(transformer).to(dtype), cast(call_of(family), dtype)
        blocks.append([])
        with dit_accel.accelerated(wanted, "sol", **SOL):
            return grads_of(wanted, call)

    (ours, present), exact = in_each_layer(work), work(torch.float64)
    assert all(torch.equal(torch.stack(listed), torch.stack(blocks[0])) for listed in blocks)
    assert ours.keys() == present.keys() == exact.keys() and any("to_k" in name for name in ours)
    for name, gradient in ours.items():
        assert_accurate(name, gradient, present[name], exact[name])


def test_watchers_and_verification_see_the_models_order(in_each_layer):
    transformer, call = module("wan").build(layers=3), call_of("wan")

    def work():
        calls = []
        with dit_accel.accelerated(transformer, "sol", verify="first-call", **SOL) as accel:
            with accel.watch(calls.append):
                run(transformer, call)
            layers = accel.report().layers
        seen = [torch.cat((call.q, call.k, call.v, call.out)) for call in calls]
        return torch.stack(seen), [(layer.relative_error, layer.kept_mass) for layer in layers]

    (seen, measured), (expected, others) = in_each_layer(work)
    assert torch.equal(seen, expected) and measured == others


def test_a_layer_that_becomes_dense_in_the_call(in_each_layer):
    """Its own attention sees permuted tokens in that call, and the model's order from the next one on."""
    transformer, call = module("wan").build(layers=3), call_of("wan")

    def work():
        with dit_accel.accelerated(
            transformer, "sol", verify="first-call", keep_dense_above=1e-6, **SOL | {"tau": 3.0, "tail": "none"}
        ) as accel:
            outputs = torch.stack([run(transformer, call) for _ in range(2)])
            assert {layer.dense_calls for layer in accel.report().layers} == {2}
        return outputs

    ours, _ = in_each_layer(work)
    plain, exact = run(transformer, call), run(transformer.double(), cast(call, torch.float64))
    assert torch.equal(ours[1], plain)
    assert_accurate("output", ours[0], plain, exact)


def test_lists_that_are_kept_between_steps(in_each_layer):
    transformer = module("wan").build(layers=3)

    def work():
        with dit_accel.accelerated(transformer, "sparge", refresh=2, dense_steps=1, **SETTINGS["sparge"]) as accel:
            outputs = of_steps("wan", accel, transformer)
            return outputs, [layer.density for layer in accel.report().layers]

    (out, density), (other, expected) = in_each_layer(work)
    assert torch.equal(out, other) and density == expected
