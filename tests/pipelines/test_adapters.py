"""Processors that others set: IP-Adapters, loaded and unloaded in both orders, and whatever drops our processors."""

import types
import warnings

import pytest
import tiny_models
import torch
from diffusers.loaders import FluxIPAdapterMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from messages import names
from tiny_models import run

import dit_accel

WINDOW = {"window": (1, 5, 4)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def adapter(transformer, tokens=4, channels=6):
    """The state dict of an IP-Adapter as XLabs saves it."""
    noise = tiny_models.numbers(9)
    text, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    projection = {"proj.weight": noise(tokens * text, channels), "proj.bias": noise(tokens * text)}
    projection |= {"norm.weight": noise(text), "norm.bias": noise(text)}
    layers = {}
    for index in range(len(transformer.transformer_blocks)):
        for kind in ("to_k_ip", "to_v_ip"):
            layers |= {f"{index}.{kind}.weight": noise(inner, text), f"{index}.{kind}.bias": noise(inner)}
    return {"image_proj": projection, "ip_adapter": layers}


def load(transformer):
    transformer._load_ip_adapter_weights(adapter(transformer), low_cpu_mem_usage=False)


def pipe_of(transformer):
    """As much of a pipeline as its adapter methods read."""
    return types.SimpleNamespace(transformer=transformer, safety_checker=None)


def set_scale(transformer, scale):
    FluxIPAdapterMixin.set_ip_adapter_scale(pipe_of(transformer), scale)


def unload(transformer):
    FluxIPAdapterMixin.unload_ip_adapter(pipe_of(transformer))


def call(tiny, image=True):
    """A call with an image prompt. Diffusers takes the prompt out of the dictionary it is given."""
    prompt = {"ip_adapter_image_embeds": [tiny_models.numbers(5)(2, 1, 6)]} if image else {}
    return tiny.call() | {"joint_attention_kwargs": prompt}


@pytest.fixture(params=["t2i", "chroma"])
def tiny(request):
    return tiny_models.get("flux", request.param)


def test_layers_with_an_adapter_are_sparse(tiny):
    """With every pair kept, the adapter's own cross-attention and the self-attention are as in the dense model."""
    transformer = tiny.build()
    load(transformer)
    names = list(transformer.state_dict())
    wanted = run(transformer, call(tiny))
    assert (wanted - tiny.dense).abs().max() > 0.05
    with dit_accel.accelerated(transformer, "gna", window="full") as accel:
        assert list(transformer.state_dict()) == names
        torch.testing.assert_close(run(transformer, call(tiny)), wanted, **CLOSE)
        assert {layer.sparse_calls for layer in accel.report().layers} == {1}
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        assert (run(transformer, call(tiny)) - wanted).abs().max() > 1e-3
    assert list(transformer.state_dict()) == names
    torch.testing.assert_close(run(transformer, call(tiny)), wanted)


def test_a_back_end_set_beside_an_adapter_stays(tiny, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    transformer = tiny.build()
    load(transformer)
    modules = [module for module in transformer.attn_processors.values() if isinstance(module, torch.nn.Module)]
    wanted = run(transformer, call(tiny))
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        transformer.set_attention_backend("_native_math")
        run(transformer, call(tiny))
    assert modules and all(module._attention_backend.value == "_native_math" for module in modules)
    torch.testing.assert_close(run(transformer, call(tiny)), wanted, **CLOSE)


def test_an_adapters_scale_is_set_and_kept(tiny):
    transformer = tiny.build()
    load(transformer)
    set_scale(transformer, 0.3)
    wanted = run(transformer, call(tiny))
    set_scale(transformer, 1.0)
    with dit_accel.accelerated(transformer, "gna", window="full"):
        set_scale(transformer, 0.3)
        torch.testing.assert_close(run(transformer, call(tiny)), wanted, **CLOSE)
    torch.testing.assert_close(run(transformer, call(tiny)), wanted)


def test_loaded_and_unloaded_while_accelerated(tiny):
    """The layers that carry the adapter are dense with a warning until `accelerate(replace=True)`; the others stay."""
    transformer, untouched = tiny.build(), tiny.build()
    load(untouched)
    wanted = run(untouched, call(tiny))
    accel = dit_accel.accelerate(transformer, "gna", window="full")
    load(transformer)
    with pytest.warns(UserWarning, match=names("2 4 FluxIPAdapterAttnProcessor")):
        torch.testing.assert_close(run(transformer, call(tiny)), wanted, **CLOSE)
    layers = accel.report().layers
    assert [layer.sparse_calls for layer in layers] == [0, 0, 1, 1]
    assert [layer.left for layer in layers] == ["FluxIPAdapterAttnProcessor"] * 2 + [None] * 2

    accel = dit_accel.accelerate(transformer, "gna", window="full", replace=True)
    torch.testing.assert_close(run(transformer, call(tiny)), wanted, **CLOSE)
    assert [layer.sparse_calls for layer in accel.report().layers] == [1, 1, 1, 1]

    unload(transformer)
    with pytest.warns(UserWarning, match=names("2 4 FluxAttnProcessor")):
        torch.testing.assert_close(run(transformer, call(tiny, image=False)), tiny.dense, **CLOSE)
    left = accel.remove()
    assert len(left) == 2 and all(".transformer_blocks." in name for name in left)
    assert {type(processor) for processor in transformer.attn_processors.values()} == {FluxAttnProcessor}
    assert torch.equal(run(transformer, call(tiny, image=False)), tiny.dense)


def test_removed_between_loading_and_a_call(tiny):
    transformer = tiny.build()
    accel = dit_accel.accelerate(transformer, "gna", **WINDOW)
    load(transformer)
    accel.remove()
    unload(transformer)
    assert {type(processor) for processor in transformer.attn_processors.values()} == {FluxAttnProcessor}
    assert torch.equal(run(transformer, call(tiny, image=False)), tiny.dense)


def test_an_adapter_in_a_compiled_model(tiny):
    transformer = tiny.build()
    load(transformer)
    with dit_accel.accelerated(transformer, "gna", **WINDOW):
        eager = run(transformer, call(tiny))
        transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(transformer, call(tiny)), eager)


def test_fused_projections_drop_our_processors_with_one_warning():
    """Older families set another processor class when their projections are fused."""
    tiny = next(tiny for tiny in tiny_models.all_models() if tiny.family == "aura_flow")
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        sparse = run(transformer, tiny.call())
        transformer.fuse_qkv_projections()
        with pytest.warns(UserWarning, match=names("FusedAuraFlowAttnProcessor2_0 replace=True")):
            fused = run(transformer, tiny.call())
        torch.testing.assert_close(fused, tiny.dense, **CLOSE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(transformer, tiny.call())
        assert {layer.left for layer in accel.report().layers} == {"FusedAuraFlowAttnProcessor2_0"}
        transformer.unfuse_qkv_projections()
        torch.testing.assert_close(run(transformer, tiny.call()), sparse)
        transformer.fuse_qkv_projections()
        with dit_accel.accelerated(transformer, "gna", replace=True, **WINDOW):
            torch.testing.assert_close(run(transformer, tiny.call()), sparse, **CLOSE)
        transformer.unfuse_qkv_projections()


@pytest.mark.parametrize("processors", ["another", "the model's own"])
def test_other_processors_warn_once_each_time_they_are_set(processors):
    tiny = tiny_models.get("flux", "t2i")
    transformer = tiny.build()
    originals = dict(transformer.attn_processors)
    with dit_accel.accelerated(transformer, "gna", **WINDOW) as accel:
        for _ in range(2):
            sparse = dict(transformer.attn_processors)
            transformer.set_attn_processor(FluxAttnProcessor() if processors == "another" else dict(originals))
            with pytest.warns(UserWarning, match=names("4 FluxAttnProcessor")):
                assert torch.equal(run(transformer, tiny.call()), tiny.dense)
            transformer.set_attn_processor(sparse)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                run(transformer, tiny.call())
        assert accel.report().sparse_calls == 8
