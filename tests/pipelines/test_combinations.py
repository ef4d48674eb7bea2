"""What users combine acceleration with, in every family and method: adapters, offloading, guidance, dense steps."""

import accelerate
import pytest
import tiny_models
import torch
from accelerated_runs import FIRST, accelerated, each_graded, each_run, plain_and_exact, train
from diffusers.hooks import apply_group_offloading
from masked_reference import assert_no_worse
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import run
from torch import nn

import dit_accel
from dit_accel.registry import get_families


@pytest.mark.check("dense is bit-identical")
@pytest.mark.check("removable")
@each_run()
def test_dense_steps_and_layers_are_the_models_own_code(tiny, method, config, evidence):
    """And so is everything after `remove`."""
    modules = dict(tiny.shared.named_modules())
    before = {name: (sorted(vars(module)), getattr(module, "processor", None)) for name, module in modules.items()}
    layers = len(list(get_families()[tiny.family].attentions(tiny.shared)))
    with dit_accel.accelerated(tiny.shared, method, dense_layers=layers, **config):
        assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)
    with dit_accel.accelerated(tiny.shared, method, dense_steps=1, dense_last_steps=1, **config) as accel:
        train(accel)
        outputs = []
        for step in range(3):
            accel.set_step(step, 3)
            outputs.append(run(tiny.shared, tiny.call()))
        assert torch.equal(outputs[0], tiny.dense) and torch.equal(outputs[2], tiny.dense)
        assert not torch.equal(outputs[1], tiny.dense)
        evidence(accel.report())
    assert dict(tiny.shared.named_modules()) == modules
    for name, module in modules.items():
        assert (sorted(vars(module)), getattr(module, "processor", None)) == before[name], name
    assert torch.equal(run(tiny.shared, tiny.call()), tiny.dense)


# Their first class takes no adapter in Diffusers; built here, to be found when that changes.
WITHOUT_ADAPTERS = ("allegro", "cogview", "easyanimate", "hunyuan_dit", "joyimage", "lumina_next", "pixart", "prx")


def test_the_classes_without_adapters_have_none():
    assert not [t.family for t in FIRST if t.family in WITHOUT_ADAPTERS and hasattr(t.shared, "add_adapter")]


def lora_of(tiny):
    """An adapter on every linear layer of the self-attention modules."""
    names = [
        f"{name}.{part}"
        for name, attention in get_families()[tiny.family].attentions(tiny.shared)
        for part, module in attention.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)


def add_lora(transformer, tiny):
    config = lora_of(tiny)  # before the seed: the first look at a shared model builds it, with random numbers
    torch.manual_seed(5)
    transformer.add_adapter(config)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter *= 0.5
    return transformer


@pytest.mark.check("LoRA")
@each_run([tiny for tiny in FIRST if tiny.doubles and tiny.family not in WITHOUT_ADAPTERS])
def test_adapters(tiny, method, config, evidence):
    """Loaded before and after, fused and unfused, against the model whose weights hold the adapter's product."""
    merged = add_lora(tiny.build(), tiny)
    merged.fuse_lora()
    for layer in [module for module in merged.modules() if isinstance(module, BaseTunerLayer)]:
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)  # merged already: the branch would count nothing anyway
    plain, exact = plain_and_exact(merged, tiny, method, config)

    before, report = accelerated(add_lora(tiny.build(), tiny), tiny.call(), method, config)
    assert_no_worse(before, plain, exact)
    evidence(report)
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, method, **config) as accel:
        train(accel)
        without = run(transformer, tiny.call())
        add_lora(transformer, tiny)
        assert_no_worse(run(transformer, tiny.call()), plain, exact)
        assert (without - plain).abs().max() > 100 * (before - plain).abs().max(), "the adapter makes no difference"
        transformer.fuse_lora()
        assert_no_worse(run(transformer, tiny.call()), plain, exact)
        transformer.unfuse_lora()
        assert_no_worse(run(transformer, tiny.call()), plain, exact)
        assert {layer.sparse_calls for layer in accel.report().layers} == {4}
    assert any("lora_A" in name for name, _ in transformer.named_parameters()), "the adapter stays"


# Diffusers' own hunyuan_dit fails with its weights on the meta device: it reads a parameter outside of its module's
# forward.
NOT_ON_META = ("hunyuan_dit",)


@pytest.mark.check("offload")
@each_run([tiny for tiny in FIRST if tiny.family not in NOT_ON_META])
def test_offloaded_weights(tiny, method, config, tmp_path, evidence):
    """Weights on the meta device or on disk between the calls of their modules; switched on before and after."""
    wanted, report = accelerated(tiny.build(), tiny.call(), method, config)
    evidence(report)
    transformer = tiny.build()
    accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))
    assert next(transformer.parameters()).is_meta
    assert torch.equal(accelerated(transformer, tiny.call(), method, config)[0], wanted)
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, method, **config) as accel:
        train(accel)
        accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in transformer.parameters())
        assert torch.equal(run(transformer, tiny.call()), wanted)
    transformer = tiny.build()
    with dit_accel.accelerated(transformer, method, **config) as accel:
        train(accel)
        cpu = torch.device("cpu")
        apply_group_offloading(
            transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level",
            offload_to_disk_path=str(tmp_path),
        )  # fmt: skip
        for _ in range(2):
            assert torch.equal(run(transformer, tiny.call()), wanted)
        assert {layer.sparse_calls for layer in accel.report().layers} == {2}


def outputs_of(transformer, inputs):
    """Tensors of all outputs, samples first."""
    with torch.no_grad():
        outputs = transformer(**inputs, return_dict=False)
    flat, pending = [], [outputs]
    while pending:
        value = pending.pop(0)
        flat += [value] if isinstance(value, torch.Tensor) else []
        pending = [*value, *pending] if isinstance(value, (list, tuple)) else pending
    return flat


def sample_of(inputs, index):
    """One sample of a call with two; HiDream's Llama states have their layers in front."""
    llama = "encoder_hidden_states_llama3"
    if llama in inputs:
        states = [layer[index : index + 1] for layer in inputs[llama]]
        states = torch.stack(states) if isinstance(inputs[llama], torch.Tensor) else states
        return sample_of({name: value for name, value in inputs.items() if name != llama}, index) | {llama: states}
    return {
        name: value[index : index + 1] if isinstance(value, (torch.Tensor, list)) and len(value) == 2 else value
        for name, value in inputs.items()
    }


@pytest.mark.check("CFG")
@each_run([tiny for tiny in FIRST if tiny.doubles])  # the others leave nothing to derive a tolerance from
def test_guidance_in_a_batch_equals_guidance_in_turn(tiny, method, config, evidence):
    """Two samples with texts of different length at once, and one after the other, all counted in the report."""
    with dit_accel.accelerated(tiny.shared, method, **config) as accel:
        train(accel)
        both = outputs_of(tiny.shared, tiny.call())
        alone = [outputs_of(tiny.shared, sample_of(tiny.call(), index)) for index in range(2)]
        evidence(accel.report())
        assert accel.report().calls == {"transformer": 3}
        assert {layer.sparse_calls for layer in accel.report().layers} == {3}
    with dit_accel.accelerated(tiny.shared_double, method, **config) as accel:
        train(accel)
        exact = outputs_of(tiny.shared_double, tiny.call(dtype=torch.float64))
    in_turn = [
        torch.cat(samples) if samples[0].ndim == both[0].ndim else samples for samples in zip(*alone, strict=True)
    ]
    if len(both) == 2 * len(alone[0]):  # a list with an output for each sample
        in_turn = [output for sample in alone for output in sample]
    for batched, single, truth in zip(both, in_turn, exact, strict=True):
        assert_no_worse(single, batched, truth)


@each_graded()
def test_layerwise_casting(tiny, method, config):
    """Weights stored in float8, whenever that was asked for: the result is that of the rounded weights."""
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    cast = tiny.build()
    cast.enable_layerwise_casting(**casting)
    rounded = tiny.build()
    stored = dict(cast.named_parameters())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(stored[name].float())
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in stored.values())
    wanted, _ = accelerated(rounded, tiny.call(), method, config)
    assert torch.equal(accelerated(cast, tiny.call(), method, config)[0], wanted)
    after = tiny.build()
    with dit_accel.accelerated(after, method, **config) as accel:
        train(accel)
        after.enable_layerwise_casting(**casting)
        assert torch.equal(run(after, tiny.call()), wanted)
        assert all(p.dtype == torch.float32 for m in accel.learned_weights().values() for p in m.parameters())


@each_graded()
def test_fused_projections(tiny, method, config):
    """Before and after: the same attention from one matrix product in place of three."""
    plain, exact = plain_and_exact(tiny.build(), tiny, method, config)
    before = tiny.build()
    before.fuse_qkv_projections()
    assert_no_worse(accelerated(before, tiny.call(), method, config)[0], plain, exact)
    after = tiny.build()
    with dit_accel.accelerated(after, method, **config) as accel:
        train(accel)
        after.fuse_qkv_projections()
        assert_no_worse(run(after, tiny.call()), plain, exact)
        assert {layer.sparse_calls for layer in accel.report().layers} == {1}


@pytest.fixture
def global_backend():
    """Diffusers makes a model's back end everybody's, and keeps it so."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@each_graded()
def test_attention_backends(tiny, method, config, global_backend):
    """Sparse calls are ours whatever the back end; dense calls and other attention take it, set before or after."""
    plain, exact = plain_and_exact(tiny.build(), tiny, method, config)
    before = tiny.build()
    before.set_attention_backend("_native_math")
    dense = run(before, tiny.call())
    assert_no_worse(accelerated(before, tiny.call(), method, config)[0], plain, exact)
    after = tiny.build()
    with dit_accel.accelerated(after, method, dense_steps=1, **config) as accel:
        train(accel)
        after.set_attention_backend("_native_math")
        accel.set_step(1, 2)
        assert_no_worse(run(after, tiny.call()), plain, exact)
        accel.set_step(0, 2)
        assert torch.equal(run(after, tiny.call()), dense)
    backends = {
        getattr(module.processor, "_attention_backend", None)
        for _, module in get_families()[tiny.family].attentions(after)
    }
    assert {backend.value for backend in backends} == {"_native_math"}


@each_graded()
def test_quantised_weights(tiny, method, config):
    """Weights in int8 by torchao, before and after: the result is that of the weights they stand for."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantise(transformer):
        quantize_(transformer, Int8WeightOnlyConfig())
        return transformer

    quantised, dequantised = quantise(tiny.build()), tiny.build()
    stored = dict(quantised.named_parameters())
    with torch.no_grad():
        for name, parameter in dequantised.named_parameters():
            value = stored[name]
            parameter.copy_(value.dequantize() if hasattr(value, "dequantize") else value)
    plain, exact = plain_and_exact(dequantised, tiny, method, config)
    assert_no_worse(accelerated(quantised, tiny.call(), method, config)[0], plain, exact)
    after = tiny.build()
    with dit_accel.accelerated(after, method, **config) as accel:
        train(accel)
        assert_no_worse(run(quantise(after), tiny.call()), plain, exact)


@pytest.mark.parametrize(("method", "config"), [("gna", {"window": (1, 3, 3)}), ("sla", {"topk": 0.3, "block": 16})])
@pytest.mark.parametrize(("family", "id"), [("flux", "t2i"), ("bria", "fibo"), ("hunyuan_image", "refiner")])
def test_the_callers_default_device(family, id, method, config):
    """Image ids and masks are read on the CPU where a script has said `torch.set_default_device("cuda")`."""
    tiny = tiny_models.get(family, id)
    transformer, inputs = tiny.shared, tiny.call()
    with dit_accel.accelerated(transformer, method, **config):
        wanted = run(transformer, inputs)
    with dit_accel.accelerated(transformer, method, verify="first-call", **config) as accel, torch.device("meta"):
        assert torch.equal(run(transformer, inputs), wanted)
        assert all(layer.relative_error > 0 for layer in accel.report().layers)
