"""The life of an accelerator: found, applied, reported, removed."""

import gc
import json
import warnings
import weakref

import numpy as np
import pytest
import torch
from accelerated_state import WINDOW, run, state_of
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from messages import names
from torch import nn

import dit_accel
from dit_accel.errors import DitAccelWarning
from dit_accel.methods.sla import SparseLinearAttention


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("dense", {}),
        ("gna", WINDOW),
        ("radial", {"decay": 0.2}),
        ("tile", {"references": 1}),
        ("sla", {"topk": 0.3, "block": 16}),
    ],
)
def test_remove_is_exact(method, config, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    before, state = run(transformer, inputs), state_of(transformer)
    accel = dit_accel.accelerate(transformer, method, dense_layers=(1,), **config)
    run(transformer, inputs)
    assert state_of(transformer) != state
    assert accel.remove() == [] and accel.remove() == []
    assert state_of(transformer) == state
    assert torch.equal(run(transformer, inputs), before)


def test_an_accelerator_that_nobody_kept_is_known(tiny_wan):
    transformer = tiny_wan()
    state = state_of(transformer)
    dit_accel.accelerate(transformer, "sla", topk=0.3, block=16)
    with pytest.raises(dit_accel.DitAccelError, match=names("sla")):
        dit_accel.accelerate(transformer, "gna", **WINDOW)
    dit_accel.accelerate(transformer, "gna", replace=True, **WINDOW).remove()
    assert state_of(transformer) == state


@pytest.mark.parametrize(("method", "config"), [("gna", WINDOW), ("sla", {"topk": 0.3, "block": 16})])
def test_what_is_made_in_inference_mode_can_be_trained(method, config, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    with torch.inference_mode():
        accel = dit_accel.accelerate(transformer, method, **config)
        before = transformer(**inputs, return_dict=False)[0]
    after = transformer(**inputs, return_dict=False)[0]
    after.square().mean().backward()
    torch.testing.assert_close(after, before)
    assert all(weight.grad is not None for module in accel.learned_weights().values() for weight in module.parameters())
    accel.remove()


def test_a_with_statement_removes_even_after_an_error(tiny_wan):
    transformer = tiny_wan()
    state = state_of(transformer)
    with pytest.raises(KeyError), dit_accel.accelerate(transformer, "gna", **WINDOW):
        raise KeyError
    assert state_of(transformer) == state
    with pytest.raises(KeyError), dit_accel.accelerated(transformer, "gna", **WINDOW):
        raise KeyError
    assert state_of(transformer) == state


def test_cross_attention_and_the_processors_class_are_untouched(tiny_wan):
    transformer = tiny_wan()
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        kinds = {name: type(processor) for name, processor in transformer.attn_processors.items()}
        assert {kind is WanAttnProcessor for name, kind in kinds.items() if "attn2" in name} == {True}
        assert {kind is WanAttnProcessor for name, kind in kinds.items() if "attn1" in name} == {False}


def test_a_processor_set_since_is_left_and_named(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    accel = dit_accel.accelerate(transformer, "sla", topk=0.3, block=16)
    replacement = WanAttnProcessor()
    transformer.blocks[1].attn1.set_processor(replacement)
    run(transformer, inputs)
    report = accel.report()
    assert [layer.left for layer in report.layers] == [None, "WanAttnProcessor"]
    assert "WanAttnProcessor was set since" in str(report)
    assert accel.remove() == ["transformer.blocks.1.attn1"]
    assert transformer.blocks[1].attn1.processor is replacement
    assert not any("sparse_linear" in name for name in transformer.state_dict())


def test_processors_that_a_pipeline_sets_for_a_call_are_counted(tiny_wan, wan_inputs):
    """As the pipelines of perturbed-attention guidance do: they put ours back before the call ends."""
    transformer, inputs = tiny_wan(), wan_inputs()
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        sparse_processors = transformer.attn_processors
        transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
        with pytest.warns(DitAccelWarning, match="perturbed-attention guidance"):
            run(transformer, inputs)
        for _ in range(3):
            run(transformer, inputs)
        transformer.set_attn_processor(dict(sparse_processors))
        run(transformer, inputs)
        first, second = accel.report().layers
    assert (first.sparse_calls, first.dense_calls, second.sparse_calls) == (5, 0, 1)
    assert second.dense_reasons == {"ran WanAttnProcessor": 4} and second.left is None


def test_base_weights_that_do_not_fit_learned_ones_name_remove(tiny_wan):
    """As with PEFT, the weights of an adapter are part of the model's state while it is there."""
    transformer = tiny_wan()
    base = {key: value.clone() for key, value in transformer.state_dict().items()}
    with dit_accel.accelerate(transformer, "sla", block=16):
        assert transformer.state_dict().keys() > base.keys()
        with pytest.raises(RuntimeError, match=names("remove()")) as error:
            transformer.load_state_dict(base)
        assert str(error.value).count("remove()") == 1
        transformer.load_state_dict(base, strict=False)
        transformer.load_state_dict(transformer.state_dict())
    transformer.load_state_dict(base)
    assert "load_state_dict" not in vars(transformer)


@pytest.mark.parametrize("set_since", [False, True])
def test_methods_that_the_user_set_on_a_model_stay(set_since, tiny_wan):
    """Before `accelerate`, they are called through ours and put back; since then, they are left alone."""
    transformer, mine = (
        tiny_wan(),
        {name: lambda *args, **kwargs: "mine" for name in ("save_pretrained", "load_state_dict")},
    )
    if not set_since:
        vars(transformer).update(mine)
    accel = dit_accel.accelerate(transformer, "sla", block=16)
    if set_since:
        vars(transformer).update(mine)
    assert transformer.save_pretrained("folder") == "mine" == transformer.load_state_dict({})
    accel.remove()
    assert {name: vars(transformer)[name] for name in mine} == mine


@pytest.mark.parametrize("method", ["gna", "sparge:block=16,block_q=16,order=morton"])
def test_a_removed_processor_that_is_set_again_runs_the_models_own(method, tiny_wan, wan_inputs):
    """As `unfuse_qkv_projections` does with those that `fuse_qkv_projections` saved."""
    transformer, inputs = tiny_wan(), wan_inputs()
    before = run(transformer, inputs)
    config = WINDOW if method == "gna" else {}
    accel = dit_accel.accelerate(transformer, method, **config)
    assert not torch.equal(run(transformer, inputs), before)
    saved = dict(transformer.attn_processors)
    accel.remove()
    transformer.set_attn_processor(saved)
    assert torch.equal(run(transformer, inputs), before)
    assert accel.report().layers[0].sparse_calls == 1


def test_every_layer_dense_is_said_at_once(tiny_wan):
    transformer = tiny_wan()
    with pytest.warns(DitAccelWarning, match=names("gna", "dense")):
        dit_accel.accelerate(transformer, "gna", dense_layers=1.0, **WINDOW).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dit_accel.accelerate(transformer, "gna", dense_layers=1, **WINDOW).remove()
        dit_accel.accelerate(transformer, "dense").remove()


def test_a_lora_loaded_in_between_stays(tiny_wan, wan_inputs):
    from peft import LoraConfig

    transformer, inputs = tiny_wan(), wan_inputs()
    accel = dit_accel.accelerate(transformer, "gna", **WINDOW)
    without = run(transformer, inputs)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert (run(transformer, inputs) - without).abs().max() > 1e-4
    assert accel.report().sparse_calls == 4
    with_lora = {key: value.clone() for key, value in transformer.state_dict().items()}
    accel.remove()
    assert sorted(transformer.state_dict()) == sorted(with_lora)
    assert any("lora_A" in key for key in with_lora)
    run(transformer, inputs)


def test_fused_projections_run_sparse(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        apart = run(transformer, inputs)
        transformer.fuse_qkv_projections()
        torch.testing.assert_close(run(transformer, inputs), apart)
        assert accel.report().sparse_calls == 4


def test_the_back_end_a_user_sets_reaches_dense_calls(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    active = _AttentionBackendRegistry._active_backend
    try:
        with dit_accel.accelerated(transformer, "gna", **WINDOW):
            transformer.set_attention_backend("_native_math")
            assert {p._attention_backend.value for p in transformer.attn_processors.values()} == {"_native_math"}
            run(transformer, inputs)
        assert {p._attention_backend.value for p in transformer.attn_processors.values()} == {"_native_math"}
    finally:
        transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(active)


def test_two_resolutions_in_turn(tiny_wan, wan_inputs):
    """Plans are kept by grid; each call gets its own."""
    transformer = tiny_wan()
    calls = [wan_inputs(5, 14, 18), wan_inputs(3, 10, 22), wan_inputs(1, 18, 14)]
    wanted = []
    for call in calls:
        with dit_accel.accelerated(transformer, "gna", window=(1, 5, 4)):
            wanted.append(run(transformer, call))
    with dit_accel.accelerated(transformer, "gna", window=(1, 5, 4)) as accel:
        for call, alone in list(zip(calls, wanted, strict=True)) * 2:
            assert torch.equal(run(transformer, call), alone)
    assert list(accel.report().grids) == ["5x7x9", "3x5x11", "1x9x7"]


def test_plans_are_made_once_a_grid_and_the_oldest_dropped(tiny_wan, wan_inputs, monkeypatch):
    from dit_accel.hooks import plan_cache

    monkeypatch.setattr(plan_cache, "GRIDS_KEPT", 2)
    transformer, built = tiny_wan(), []
    accel = dit_accel.accelerate(transformer, "gna", window=(1, 3, 3))
    plans = accel._plans
    make = plans._method.plan
    object.__setattr__(plans, "_method", type("M", (), {"plan": lambda s, g, c: built.append(str(g)) or make(g, c)})())
    for width in (8, 8, 10, 8, 12, 8):
        run(transformer, wan_inputs(1, 8, width))
    assert built == ["1x4x4", "1x4x5", "1x4x6", "1x4x4"]


def test_the_report_counts_and_explains(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    with dit_accel.accelerated(
        transformer, "gna", dense_steps=1, dense_last_steps=1, dense_layers=(1,), **WINDOW
    ) as accel:
        for step in range(5):
            accel.set_step(step, 5)
            for _ in range(2):
                run(transformer, inputs)
        report = accel.report()
    density = dit_accel.plan("gna", dit_accel.TokenGrid(5, 7, 9), **WINDOW).density
    layers = report.as_dict()["layers"]
    assert json.loads(json.dumps(report.as_dict()))["calls"] == {"transformer": 10}
    assert [(layer["sparse_calls"], layer["dense_calls"]) for layer in layers] == [(6, 4), (0, 10), (6, 4)]
    assert layers[0]["dense_reasons"] == {"dense_steps=1": 2, "dense_last_steps=1": 2}
    assert layers[1]["dense_reasons"] == {"dense_layers=(1,)": 10}
    assert layers[0]["density"] == density and layers[1]["density"] is None
    assert layers[0]["kernels"] == {"portable": "the first choice on cpu"}
    text = str(report)
    for part in (
        "12 sparse and 18 dense",
        "grid 5x7x9",
        f"6 sparse at density {density:.4f} (portable: the first choice on cpu)",
        "layer 1: 10 dense",
    ):
        assert part in text
    assert str(accel.report()) == text, "the report stays after remove()"


@pytest.mark.check("cache", family="wan", method="gna")
def test_layers_that_a_cache_skips_are_not_counted(tiny_wan, wan_inputs, evidence):
    from diffusers import FirstBlockCacheConfig

    transformer, inputs = tiny_wan(4), wan_inputs()
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        for _ in range(3):
            with transformer.cache_context("cond"):
                run(transformer, inputs)
        transformer.disable_cache()
        assert [layer.sparse_calls for layer in accel.report().layers] == [3, 1, 1, 1]
        evidence(accel.report())


def test_conditioning_images_of_another_size_are_in_the_report(tiny_flux, flux_inputs):
    transformer = tiny_flux()
    with dit_accel.accelerated(transformer, "gna", window=(1, 3, 3)) as accel:
        run(transformer, flux_inputs((13, 11), (3, 3)))
    assert "9 tokens of conditioning images" in str(accel.report())


def test_learned_weights_train_and_are_seen(tiny_wan, wan_inputs):
    """SLA's projection is a child of its attention module: optimizers, state dicts and gradients reach it."""
    transformer = tiny_wan().bfloat16()
    inputs = {key: value.bfloat16() for key, value in wan_inputs().items()}
    with dit_accel.accelerated(transformer, "sla", topk=0.3, block=16, dense_layers=1) as accel:
        (learned,) = accel.learned_weights().values()
        assert isinstance(learned, SparseLinearAttention)
        assert learned is transformer.blocks[1].attn1.sparse_linear
        assert transformer.dtype == torch.bfloat16 and learned.proj.weight.dtype == torch.float32
        untrained = run(transformer, inputs)
        nn.init.normal_(learned.proj.weight)
        trained = transformer(**inputs, return_dict=False)[0]
        assert (trained - untrained).abs().max() > 1e-3
        trained.square().mean().backward()
        assert learned.proj.weight.grad.abs().max() > 0
        assert any("blocks.1.attn1.sparse_linear.proj.weight" in name for name, _ in transformer.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan().train(), wan_inputs()
    grads = []
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        for _ in range(2):
            transformer.zero_grad()
            transformer(**inputs, return_dict=False)[0].square().mean().backward()
            grads.append(transformer.blocks[0].attn1.to_k.weight.grad.clone())
            transformer.enable_gradient_checkpointing()
        assert {layer.sparse_calls for layer in accel.report().layers} == {2}
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_a_bare_transformer_follows_the_timesteps(tiny_wan, wan_inputs):
    transformer = tiny_wan()
    with dit_accel.accelerated(transformer, "gna", dense_steps=2, **WINDOW) as accel:
        for timestep in (1000, 1000, 700, 300, 900):
            run(transformer, wan_inputs(timestep=timestep))
        assert accel.report().layers[0].dense_reasons == {"dense_steps=2": 4}


def test_numbers_of_numpy_are_numbers(tiny_wan):
    grid = dit_accel.TokenGrid(4, 8, 8)
    plan = dit_accel.plan("gna", grid, window=(np.int64(3), 3, np.float64(0.5)), causal=np.bool_(True))
    assert plan.config == dit_accel.plan("gna", grid, window=(3, 3, 0.5), causal=True).config
    assert dit_accel.plan("tile", grid, references=torch.tensor(2)).config.references == 2
    with dit_accel.accelerated(tiny_wan(), "gna", window=np.int64(3), dense_steps=np.int64(2)) as accel:
        assert accel.setting.schedule.dense_steps == 2


def test_dir_shows_the_public_names_alone():
    assert {name for name in dir(dit_accel) if not name.startswith("__")} == set(dit_accel.__all__)


def test_one_transformer_under_two_names_is_accelerated_once(tiny_wan, wan_inputs):
    transformer = tiny_wan()
    state = state_of(transformer)
    target = type("Pipe", (), {"components": {"transformer": transformer, "transformer_2": transformer}})()
    with dit_accel.accelerated(target, "gna", **WINDOW) as accel:
        run(transformer, wan_inputs())
        assert list(accel.transformers) == ["transformer"] and accel.report().sparse_calls == 2
        assert accel.remove() == []
    assert state_of(transformer) == state


def test_nothing_outlives_the_model(tiny_wan, wan_inputs):
    transformer = tiny_wan()
    accel = dit_accel.accelerate(transformer, "gna", **WINDOW)
    run(transformer, wan_inputs())
    alive = weakref.ref(transformer), weakref.ref(accel)
    del transformer, accel
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
