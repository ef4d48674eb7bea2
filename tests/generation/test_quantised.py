"""Quantised transformers: every method and cache on weights that Diffusers' loader quantised, and what is refused."""

import json

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from messages import names
from method_settings import in_models
from peft import LoraConfig
from tiny_models import get, module, run

import dit_accel
from dit_accel.checkpoint import lora, model_weights
from dit_accel.errors import DitAccelError
from dit_accel.generation import quantised, sources
from dit_accel.registry import get_methods

NOT_HERE = {"dense", "heads", "scaledit"}  # their settings are a file or a model's own
METHODS = {name: settings for name, settings in in_models().items() if name not in NOT_HERE}
CACHES = ("first-block:threshold=1e9", "mag:threshold=9,mag_ratios=1.0", "taylorseer:use_lite_mode=true")
TINY = {"wan": get("wan", "t2v"), "flux": get("flux", "t2i")}


def save(family, folder):
    TINY[family].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in TINY}


def load(family, folders, choice):
    """The tiny transformer as Diffusers quantises it, and one whose weights are those that it stands for."""
    import diffusers
    from torchao import quantization

    config = diffusers.TorchAoConfig(getattr(quantization, quantised.TORCHAO[choice])())
    plain = TINY[family].build()
    model = type(plain).from_pretrained(folders[family], quantization_config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model_weights.plain(dict(model.named_parameters())[name]))
    return model, plain


def error(output, wanted):
    return ((output - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("choice", "limit"), [("int8", 1e-4), ("fp8", 1e-4), ("int8-dynamic", 0.05)])
def test_every_method_and_cache(folders, family, choice, limit):
    """The result is that of the dequantised weights; int8-dynamic rounds activations besides. `remove` is exact."""
    model, plain = load(family, folders, choice)
    call = TINY[family].call()
    dense = run(model, call)
    assert error(dense, run(plain, call)) < limit
    assert set(METHODS) | NOT_HERE == set(get_methods())
    for method, settings in METHODS.items():
        if family == "flux" and method in ("radial", "tile"):  # which leave a single frame dense
            continue
        outputs = []
        for transformer in (model, plain):
            with dit_accel.accelerated(transformer, method, **settings) as accel:
                outputs.append(run(transformer, call))
            assert all(layer.sparse_calls for layer in accel.report().layers), method
        assert error(*outputs) < limit, method
        assert torch.equal(run(model, call), dense), method
    for cache in CACHES:
        with dit_accel.accelerated(model, "gna", window=(1, 5, 4), cache=cache) as accel:
            for step in range(5):
                accel.set_step(step, 5)
                assert run(model, call).isfinite().all()
        assert "0 skipped" not in str(accel.report()), cache
        assert torch.equal(run(model, call), dense), cache


def test_weights_that_are_read(folders):
    """Learned weights get gradients and adapters load; what compares or replaces the model's own weights is refused."""
    model, _ = load("wan", folders, "int8")
    with dit_accel.accelerated(model, "sla", topk=0.35, block=16) as accel:
        model(**TINY["wan"].call(), return_dict=False)[0].sum().backward()
        learned = [weight for module in accel.learned_weights().values() for weight in module.parameters()]
        assert learned and all(weight.dtype == torch.float32 and weight.grad is not None for weight in learned)
    before = run(model, TINY["wan"].call())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    with dit_accel.accelerated(model, "gna", window=(3, 5, 4)):
        assert not torch.allclose(run(model, TINY["wan"].call()), before)
    for read in (lora.fingerprint, model_weights.check_replaceable):
        with pytest.raises(DitAccelError, match=names("before quantising")):
            read(model)


def test_saved_from_a_model_and_loaded_into_it_quantised(folders, tmp_path):
    """And the reverse; learned weights are the same in both."""
    quantised_model, plain = load("wan", folders, "int8")
    for number, (source, target) in enumerate([(plain, quantised_model), (quantised_model, plain)]):
        with dit_accel.accelerated(source, "sla", **METHODS["sla"]) as accel:
            for module in accel.learned_weights().values():
                torch.nn.init.normal_(module.proj.weight)
            wanted = {name: module.proj.weight.clone() for name, module in accel.learned_weights().items()}
            accel.save_pretrained(tmp_path / str(number))
        with dit_accel.load(target, tmp_path / str(number)) as loaded:
            for name, module in loaded.learned_weights().items():
                assert torch.equal(module.proj.weight, wanted[name])


@pytest.mark.parametrize("choice", ["int8", "int8-dynamic"])
def test_offloaded_and_compiled(folders, choice):
    """On a CPU the weights stay, so the outputs are the same."""
    call, cpu = TINY["wan"].call(), torch.device("cpu")

    def outputs(prepare):
        model, _ = load("wan", folders, choice)
        with dit_accel.accelerated(model, "gna", window=(1, 5, 4)) as accel:
            prepare(model)
            output = run(model, call)
        assert accel.report().sparse_calls
        return output

    def offload(model):
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
        )

    plain = outputs(lambda model: None)
    assert torch.equal(outputs(offload), plain)
    assert torch.equal(outputs(lambda model: model.compile_repeated_blocks(backend="eager")), plain)


def kinds(model):
    return {type(weight.data).__name__ for weight in model.parameters()}


def test_the_command_line(cli, wan_folder, flux_folder, demo, tmp_path, monkeypatch):
    """`--quantize` quantises the transformers and no other component, also of the embedded model."""
    cpu = torch.device("cpu")
    for name in (wan_folder, flux_folder, "demo"):
        pipe = sources.load(sources.find(str(name)), torch.float32, cpu, quantize="int8")
        assert "Int8Tensor" in kinds(pipe.transformer) and kinds(pipe.text_encoder) == {"Tensor"}
    small = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2, "--method", "gna:window=0.5")
    outcome = cli("generate", "--model", wan_folder, *small, "--quantize", "int8", "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["request"]["quantize"] == "int8" and record["report"]["sparse_calls"] > 0
    with dit_accel.accelerated(pipe, "gna", window=0.5) as accel:
        accel.save_pretrained(tmp_path / "gna")
    loaded = (*small[:-2], "--load", tmp_path / "gna", "--quantize", "int8", "--output", tmp_path / "loaded.gif")
    outcome = cli("generate", "--model", "demo", *loaded)
    assert outcome.status == 0, outcome.err
    pipe.save_pretrained(tmp_path / "saved")
    more = ("--prompts", "demo", "--output", tmp_path / "trained")
    outcome = cli("train", "--model", tmp_path / "saved", "--method", "sla", *more)
    assert outcome.status == 2 and "quantised transformer" in outcome.err
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    for choice, word in [
        ("int3", "int3"),
        ("fp8-dynamic", "8.9"),
        (f"gguf:{tmp_path}/none.gguf", "pip install" if quantised.find_spec("gguf") is None else "none.gguf"),
    ]:
        outcome = cli("generate", *small, "--quantize", choice, "--output", tmp_path / "b.gif")
        assert outcome.status == 2 and word in outcome.err and not (tmp_path / "b.gif").exists()
    monkeypatch.setattr(quantised, "find_spec", lambda name: name)  # what follows is checked before the package is used
    for choice, word in [(f"gguf:{tmp_path}/no.gguf", "no.gguf"), ("gguf:a,b", "2 files")]:
        assert word in cli("generate", *small, "--quantize", choice, "--output", tmp_path / "b.gif").err
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert "pip install" in cli("eval", *small, "--quantize", "int8", "--output", tmp_path / "e").err


def test_gguf(tmp_path, demo_folder):
    """A file in 8 bits, in the names of Diffusers, in place of the folder's transformer."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    source = sources.find(str(demo_folder))
    cpu = torch.device("cpu")
    plain = sources.load(source, torch.float32, cpu).transformer
    eight = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "wan")
    for name, weight in plain.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, eight), raw_dtype=eight)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    choice = f"gguf:{tmp_path / 't.gguf'}"
    quantised.check(choice, source, cpu)
    model = sources.load(source, torch.float32, cpu, quantize=choice).transformer
    assert "GGUFParameter" in {type(weight).__name__ for weight in model.parameters()}
    call = module("wan").inputs(channels=plain.config.in_channels)
    call["encoder_hidden_states"] = torch.randn(2, 7, plain.config.text_dim)
    dense = run(model, call)
    assert 0 < error(dense, run(plain, call)) < 0.05
    for method, settings in METHODS.items():
        if method == "moh":  # the model has a single head
            continue
        with dit_accel.accelerated(model, method, cache=CACHES[0], **settings) as accel:
            accel.set_step(0, 2)
            sparse = run(model, call)
        with dit_accel.accelerated(plain, method, **settings):
            assert error(sparse, run(plain, call)) < 0.05, method
        assert accel.report().sparse_calls and torch.equal(run(model, call), dense), method
