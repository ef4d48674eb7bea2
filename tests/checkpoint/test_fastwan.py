"""FastWan under its published names: what it computes, its sampler, and the 14B model's mixed spelling."""

import json

import pytest
import torch
from accuracy import assert_accurate
from published_weights import FASTVIDEO, Example, by_formula, in_dtype, moved, random, renamed, vsa
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint.few_steps import dmd
from dit_accel.errors import DitAccelError

WIDTH, HEADS = 24, 2
SAMPLER = dmd((1000.0, 757.0, 522.0), 8)


def gates(layers=2):
    return [(random(WIDTH, WIDTH, seed=10 + i, size=0.3), random(WIDTH, seed=20 + i)) for i in range(layers)]


def published(model, spelling="diffusers"):
    weights = moved(model)
    if spelling == "mixed":
        half = {key: value for key, value in weights.items() if key.startswith("blocks.1.")}
        weights = {key: value for key, value in weights.items() if key not in half} | renamed(half, FASTVIDEO)
        weights["blocks.0.to_q.weight"] = torch.zeros(WIDTH, WIDTH)  # a second time; that of Diffusers counts
    for layer, (weight, bias) in enumerate(gates()):
        weights |= {f"blocks.{layer}.to_gate_compress.weight": weight, f"blocks.{layer}.to_gate_compress.bias": bias}
    return weights


EXAMPLE = Example("wan", published)


def formula(model, inputs, grid, dtype, sparsity=0.8):
    learned = [(weight.to(dtype), bias.to(dtype)) for weight, bias in gates()]
    attentions = [block.attn1 for block in model.blocks]

    def attend(layer, q, k, v, hidden):
        weight, bias = learned[layer]
        gate = (hidden @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return vsa(q, k, v, gate, grid, sparsity)

    return by_formula(model.to(dtype), in_dtype(inputs, dtype), attend, attentions)


@pytest.mark.parametrize("grid", [(5, 7, 9), (4, 8, 4), (1, 4, 9), (2, 11, 6)], ids=str)
@pytest.mark.parametrize("spelling", ["diffusers", "mixed"])
def test_it_computes_the_authors_function(spelling, grid, tiny_wan, wan_inputs, tmp_path):
    """On grids that tiles do not divide, where counting tokens and counting tiles differ, and on one that they do."""
    model, reference = tiny_wan(), tiny_wan()
    inputs = wan_inputs(grid[0], 2 * grid[1], 2 * grid[2])
    save_file(published(model, spelling), tmp_path / "weights.safetensors")
    reference.load_state_dict(moved(model))
    plain, exact = (formula(reference, inputs, grid, dtype) for dtype in (torch.float32, torch.float64))
    with dit_accel.load(model, tmp_path / "weights.safetensors") as accel, torch.no_grad():
        assert (accel.setting.method, accel.setting.config.topk, accel.setting.config.tile) == ("proxy", 0.2, (4, 4, 4))
        out = model(**inputs, return_dict=False)[0]
        assert_accurate(spelling, out, plain, exact)
        report = str(accel.report())
        assert ("1 weights are in the file under two names" in report) == (spelling == "mixed")
        accel.save_pretrained(tmp_path / "ours")
    with dit_accel.load(model, tmp_path / "ours"), torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], out)


def test_the_gate_is_compiled_and_trained(tiny_wan, wan_inputs, tmp_path):
    """The compiled model's output and gradients are those of the eager one."""
    save_file(published(tiny_wan()), tmp_path / "weights.safetensors")
    results = []
    for compiled in (False, True):
        model = tiny_wan()
        accel = dit_accel.load(model, tmp_path / "weights.safetensors")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        out = run(**wan_inputs(), return_dict=False)[0]
        out.square().sum().backward()
        learned = [weight.grad for module in accel.learned_weights().values() for weight in module.parameters()]
        results.append([out.detach(), *learned, model.blocks[0].attn1.to_q.weight.grad])
        assert len(learned) == 4 and all(bool(grad.abs().max() > 0) for grad in learned)
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.fixture
def folder(wan_folder, tmp_path):
    """Makes a pipeline's folder with an index of that class, with gates or not."""
    from diffusers import WanTransformer3DModel

    def make(name, gated):
        place = tmp_path / name
        (place / "transformer").mkdir(parents=True)
        (place / "model_index.json").write_text(json.dumps({"_class_name": name}))
        model = WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
        weights = published(model) if gated else moved(model)
        save_file(weights, place / "transformer" / "diffusion_pytorch_model.safetensors")
        return place

    return make


@pytest.mark.parametrize(
    ("name", "gated", "method", "calls"),
    [("WanDMDPipeline", True, "proxy", 3), ("WanDMDPipeline", False, "dense", 3), ("WanPipeline", True, "proxy", 50)],
)
def test_the_index_tells_what_was_distilled(name, gated, method, calls, folder, wan_folder):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    old = pipe.scheduler
    with dit_accel.load(pipe, folder(name, gated)) as accel:
        assert (accel.setting.method, accel.trained.sampler) == (method, SAMPLER if calls == 3 else None)
        pipe("a circle", height=96, width=96, num_frames=5, output_type="latent", guidance_scale=1.0)
        assert accel.report().calls == {"transformer": calls}
    assert pipe.scheduler is old


def test_a_dense_wan_is_no_published_format(folder, tiny_wan):
    with pytest.raises(DitAccelError, match="of no known format"):
        dit_accel.load(tiny_wan(), folder("WanPipeline", False))
