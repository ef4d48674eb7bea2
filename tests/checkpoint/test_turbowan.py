"""TurboWan under its published names: what it computes, its sampler, int8, and what is refused."""

import importlib.util
import json
import re

import pytest
import torch
from accuracy import assert_accurate
from messages import names, says
from published_weights import (
    FASTVIDEO,
    ORIGINAL,
    Example,
    by_formula,
    in_dtype,
    moved,
    random,
    renamed,
    sla,
    snapshot,
    unchanged,
)
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint.few_steps import rcm
from dit_accel.checkpoint.published import detect
from dit_accel.checkpoint.weight_files import open_weights
from dit_accel.errors import DitAccelError

HEADS, DIM = 2, 12
SPELLINGS = {
    "original": (ORIGINAL, "blocks.{}.self_attn.attn_op.local_attn.proj_l."),
    "diffusers": ((), "blocks.{}.attn1.attn_op.local_attn.proj_l."),
    "fastvideo": (FASTVIDEO, "blocks.{}.attn1.attn_impl.proj_l."),
}


def projections(layers=2, width=DIM):
    return [(random(width, width, seed=10 + i, size=0.3), random(width, seed=20 + i)) for i in range(layers)]


def published(model, spelling="diffusers", prefix="", weights=None, width=DIM):
    """A state dict in that spelling; the original's patch embedding is a linear layer's."""
    table, projection = SPELLINGS[spelling]
    weights = renamed(moved(model) if weights is None else weights, table)
    if spelling == "original":
        weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    for layer, (weight, bias) in enumerate(projections(width=width)):
        weights |= {projection.format(layer) + "weight": weight, projection.format(layer) + "bias": bias}
    return {prefix + key: value.contiguous() for key, value in weights.items()}


EXAMPLE = Example("wan", published)


def formula(model, inputs, dtype):
    learned = [(weight.to(dtype), bias.to(dtype)) for weight, bias in projections()]
    attentions = [block.attn1 for block in model.blocks]

    def attend(layer, q, k, v, hidden):
        return sla(q, k, v, *learned[layer])

    return by_formula(model.to(dtype), in_dtype(inputs, dtype), attend, attentions)


@pytest.mark.parametrize("size", [(5, 14, 18), (2, 10, 14), (3, 22, 30), (2, 16, 16)], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_computes_the_authors_function(spelling, size, tiny_wan, wan_inputs, tmp_path):
    """At odd sizes, a block cut short at the end, and fewer than 10 key blocks, where the authors' count is 0."""
    model, reference, inputs = tiny_wan(), tiny_wan(), wan_inputs(*size)
    file = tmp_path / "weights.safetensors"
    save_file(published(model, spelling, prefix="net." if spelling == "original" else ""), file)
    reference.load_state_dict(moved(model))
    plain, exact = formula(reference, inputs, torch.float32), formula(reference, inputs, torch.float64)
    with dit_accel.load(model, file) as accel, torch.no_grad():
        assert accel.setting.config == dit_accel.registry.make_config("sla", {"topk": 0.1, "block_q": 128, "block": 64})
        assert_accurate(spelling, model(**inputs, return_dict=False)[0], plain, exact)


def test_a_layer_that_a_cache_keeps_dense_needs_no_learned_weights(tiny_wan, tmp_path):
    model = tiny_wan()
    save_file(published(model), tmp_path / "weights.safetensors")
    with dit_accel.load(model, tmp_path / "weights.safetensors", cache="first-block:threshold=0.2") as accel:
        ((name, module),) = accel.learned_weights().items()
        assert ".1." in name and torch.equal(module.proj.weight, projections()[1][0])


def test_its_pipeline_folder_opens_as_the_stock_one(cli, wan_folder, copy, tmp_path):
    """Its index names a class that Diffusers lacks, and a scheduler that is not theirs."""
    from diffusers import WanTransformer3DModel

    folder = copy(wan_folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    save_file(published(model), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    size = ("--frames", 5, "--height", 96, "--width", 96, "--output", tmp_path / "clip.mp4", "--compare")
    done = cli("generate", "--model", folder, "--load", folder, "--set", "topk=0.2", "--steps", 2, *size)
    assert done.status == 0, done.err
    assert "sla(topk=0.2" in done.out and "2 layers, 2 calls" in done.out
    diagnosis = cli("doctor", "--model", folder, "--load", folder)
    assert says(diagnosis.out, "turbowan,", "num_inference_steps=4", "fits", folder)


def test_an_evaluation_gives_each_its_own_number_of_steps(cli, wan_folder, tmp_path):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    save_file(published(model), tmp_path / "turbo.safetensors")
    (tmp_path / "prompts.txt").write_text("a circle\n")
    size = ("--frames", 5, "--height", 96, "--width", 96, "--metric", "psnr")
    where = ("--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "eval")
    done = cli("eval", "--model", wan_folder, "--load", tmp_path / "turbo.safetensors", *where, *size)
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
    steps = {row["steps"] for row in rows if "steps" in row}
    assert "from turbo.safetensors" in done.out and steps == {50, 4}, (steps, rows[0].keys())


def test_doctor_says_why_weights_do_not_fit(cli, wan_folder, tiny_wan, tmp_path):
    save_file(published(tiny_wan(3)), tmp_path / "weights.safetensors")
    diagnosis = cli("doctor", "--model", wan_folder, "--load", tmp_path / "weights.safetensors", "--json")
    finding = json.loads(diagnosis.out)[-1]
    assert diagnosis.status == 1 and not finding["works"]
    assert "makes blocks.0.ffn.net.0.proj.bias (32,)" in finding["detail"]
    listed = json.loads(cli("ls", "formats", "--json").out)
    assert {"turbowan", "fastwan", "clear"} <= {known["name"] for known in listed}
    assert "WanTransformer3DModel" in cli("ls", "formats").out


def test_the_configuration_tells_its_share(tiny_wan, tmp_path):
    (tmp_path / "transformer").mkdir()
    save_file(published(tiny_wan()), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer" / "config.json").write_text('{"attention_type": "sla", "sla_topk": 0.15}')
    with dit_accel.load(tiny_wan(), tmp_path) as accel:
        assert accel.setting.config.topk == 0.15
    with dit_accel.load(tiny_wan(), tmp_path, topk=0.3) as accel:
        assert accel.setting.config.topk == 0.3


def quantised(weight):
    """int8 and the scale of each tile of 128 x 128, as TurboDiffusion's quant.hpp makes them."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    whole = torch.empty_like(weight, dtype=torch.int8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[part].abs().max() / 128
            whole[part] = (weight[part] / scale[i, j]).round().clamp(-128, 127).to(torch.int8)
    return whole, scale


def in_int8(model, endings, odd=3):
    """A state dict with the blocks' matrices in int8, and the weights that they stand for; tiles differ in scale."""
    weights = moved(model)
    stored = dict(weights)
    for key in [key for key in weights if re.search(r"blocks.*(to_|ffn).*weight", key)]:
        stem, weight = key.removesuffix("weight"), stored.pop(key).clone()
        weight[:, 128:] *= odd
        whole, scale = quantised(weight)
        stored |= {stem + endings[0]: whole, stem + endings[1]: scale}
        wide = scale.repeat_interleave(128, 0)[: len(whole)].repeat_interleave(128, 1)[:, : whole.shape[1]]
        weights[key] = whole.float() * wide
    assert sum(value.dtype == torch.int8 for value in stored.values()) == 2 * 10
    return stored, weights


@pytest.mark.parametrize("spelt", [("original", "int8_weight", "scale"), ("diffusers", "weight", "weight_scale_inv")])
def test_int8_weights_are_dequantised_tile_by_tile(spelt, tiny_wan, tmp_path):
    """A layer of 200 columns has 2 tiles of different scales."""
    spelling, *endings = spelt
    model = tiny_wan(ffn_dim=200)
    stored, wanted = in_int8(model, endings)
    save_file(published(model, spelling, weights=stored), tmp_path / "quant.safetensors")
    with dit_accel.load(model, tmp_path / "quant.safetensors"):
        for key, value in wanted.items():
            assert torch.equal(model.get_parameter(key), value), key
    bad = stored | {f"blocks.0.ffn.net.2.{endings[1]}": torch.zeros(1, 1)}
    save_file(published(model, spelling, weights=bad), tmp_path / "bad.safetensors")
    with pytest.raises(DitAccelError, match=r"blocks\.0\.ffn"):
        dit_accel.load(model, tmp_path / "bad.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_may_stay_in_int8(dtype, tiny_wan, wan_inputs, tmp_path):
    """They multiply as dequantised ones do, bit for bit. Matrices that tiles do not divide are dequantised."""
    size = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "freq_dim": 256}
    model, inputs = tiny_wan(**size), in_dtype(wan_inputs(), dtype)
    stored, _ = in_int8(model, ("int8_weight", "scale"))
    file = tmp_path / "quant.safetensors"
    weights = published(model, weights=stored, width=64)
    save_file(weights, file)
    model = model.to(dtype)
    before = snapshot(model)
    with dit_accel.load(model, file) as accel, torch.no_grad():
        assert says(str(accel.report()), "20", "keep_int8=True", "--keep-int8")
        plain = model(**inputs, return_dict=False)[0]
    with dit_accel.load(model, file, keep_int8=True) as accel, torch.no_grad():
        stay = [name for name, value in model.named_parameters() if hasattr(value, "qdata")]
        assert len(stay) == 20 and says(str(accel.report()), "20", "int8,", "torchao")
        assert torch.equal(model.blocks[0].ffn.net[2].weight.qdata, stored["blocks.0.ffn.net.2.int8_weight"])
        assert torch.equal(model(**inputs, return_dict=False)[0], plain)
        accel.save_pretrained(tmp_path / "ours")
    assert unchanged(model, before)
    with dit_accel.load(model, tmp_path / "ours"), torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], plain)
    with pytest.raises(DitAccelError, match=names("keep_int8")):
        dit_accel.load(model, tmp_path / "ours", keep_int8=True)


def test_what_cannot_stay_in_int8_is_said(monkeypatch, cli, tiny_wan, wan_folder, tmp_path):
    model = tiny_wan(ffn_dim=200)
    for name, weights in (("odd", in_int8(model, ("int8_weight", "scale"))[0]), ("none", None)):
        save_file(published(model, weights=weights), tmp_path / f"{name}.safetensors")
        with pytest.raises(DitAccelError, match=names("keep_int8=True", "none")):
            dit_accel.load(model, tmp_path / f"{name}.safetensors", keep_int8=True)
    done = cli("generate", "--model", wan_folder, "--method", "gna", "--keep-int8", "--output", tmp_path / "clip.mp4")
    assert done.status == 2 and says(done.err, "--keep-int8", "--load")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = tiny_wan(num_attention_heads=2, attention_head_dim=64, ffn_dim=256)
    stored, _ = in_int8(model, ("int8_weight", "scale"))
    save_file(published(model, weights=stored, width=64), tmp_path / "quant.safetensors")
    with pytest.raises(DitAccelError, match=names("keep_int8=True", "pip install torchao")):
        dit_accel.load(model, tmp_path / "quant.safetensors", keep_int8=True)


def test_a_pipeline_gets_its_sampler_and_gives_it_back(wan_folder, tmp_path):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    old, before = pipe.scheduler, snapshot(pipe.transformer)
    save_file(published(pipe.transformer, "original"), tmp_path / "weights.safetensors")
    accel = dit_accel.load(pipe, tmp_path / "weights.safetensors")
    call = {"height": 96, "width": 96, "num_frames": 5, "output_type": "latent"}
    frames = pipe("a circle", generator=torch.Generator().manual_seed(0), **call).frames
    report = str(accel.report())
    assert accel.report().calls == {"transformer": 4}
    assert "calls default to num_inference_steps=4, guidance_scale=1.0" in report and "turbowan" in report
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], torch.tensor(rcm(80).sigmas))
    accel.save_pretrained(tmp_path / "ours")
    accel.remove()
    assert pipe.scheduler is old and type(pipe) is WanPipeline
    assert unchanged(pipe.transformer, before)
    with dit_accel.load(pipe, tmp_path / "ours") as again:
        assert again.trained.full and again.trained.sampler == rcm(80)
        assert torch.equal(pipe("a circle", generator=torch.Generator().manual_seed(0), **call).frames, frames)
    assert pipe.scheduler is old and type(pipe) is WanPipeline


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_command_samples_in_a_few_steps(steps, cli, wan_folder, tmp_path):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    save_file(published(model), tmp_path / "weights.safetensors")
    size = ("--frames", 5, "--height", 96, "--width", 96, "--output", tmp_path / "clip.mp4")
    chosen = () if steps == 4 else ("--steps", steps)
    done = cli("generate", "--model", wan_folder, "--load", tmp_path / "weights.safetensors", *chosen, *size)
    assert done.status == 0, done.err
    assert f"2 layers, {steps} call" in done.out and "FewStepScheduler" in done.out


def test_from_an_image_the_first_level_is_another(tiny_wan, tmp_path):
    """36 channels in and 16 out, in proportion; two models meet at 0.9."""
    for spelling in SPELLINGS:
        for component in ("transformer", "transformer_2"):
            (tmp_path / spelling / component).mkdir(parents=True)
            weights = published(tiny_wan(in_channels=9, out_channels=4), spelling)
            if spelling == "fastvideo":
                weights["patch_embedding.proj.weight"] = weights.pop("patch_embedding.weight")
            save_file(weights, tmp_path / spelling / component / "weights.safetensors")
        files = open_weights(tmp_path / spelling)
        assert detect(files).tuned(files).sampler == rcm(200, ode=True, boundary_ratio=0.9)


def test_an_accelerator_stays_at_work_when_its_replacement_does_not_fit(tiny_wan, tmp_path):
    """Such as an int8 tensor without its scale."""
    model = tiny_wan()
    before = snapshot(model)
    first = dit_accel.accelerate(model, "gna", window=3)
    quantised = {"blocks.0.ffn.net.2.int8_weight": torch.zeros(24, 32, dtype=torch.int8)}
    save_file(published(model) | quantised, tmp_path / "weights.safetensors")
    with pytest.raises(DitAccelError, match=names("blocks.0.ffn.net.2.int8_weight")):
        dit_accel.load(model, tmp_path / "weights.safetensors", replace=True)
    assert first.active
    first.remove()
    assert unchanged(model, before)


@pytest.mark.parametrize("before", [0.5, 0.95])
def test_two_transformers_meet_at_the_authors_boundary(before, wan_folder, tmp_path):
    """Whatever the pipeline's was: the first computes the noisy levels 988 and 932, the second 852 and 608."""
    from diffusers import WanPipeline, WanTransformer3DModel

    second = WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    pipe = WanPipeline.from_pretrained(wan_folder, transformer_2=second, boundary_ratio=before)
    pipe.set_progress_bar_config(disable=True)
    for component in ("transformer", "transformer_2"):
        (tmp_path / component).mkdir()
        weights = published(getattr(pipe, component))
        save_file(weights, tmp_path / component / "diffusion_pytorch_model.safetensors")
    levels = {"transformer": [], "transformer_2": []}
    for component, seen in levels.items():
        module = getattr(pipe, component)
        module.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(int(kwargs["timestep"][0])), with_kwargs=True
        )
    with dit_accel.load(pipe, tmp_path) as accel:
        pipe("a circle", height=96, width=96, num_frames=5, output_type="latent")
        assert levels == {"transformer": [988, 932], "transformer_2": [852, 608]}
        assert accel.report().calls == {"transformer": 2, "transformer_2": 2}
        assert {layer.sparse_calls for layer in accel.report().layers} == {2}
    assert pipe.config.boundary_ratio == before


@pytest.mark.parametrize(
    ("named", "stock"),
    [("WanDMDPipeline", "WanPipeline"), ("WanImageToVideoDmdPipeline", "WanImageToVideoPipeline")],
)
def test_the_classes_that_converted_folders_name_open_as_stock_ones(named, stock, tmp_path):
    from dit_accel.generation.sources import find

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": named}))
    assert find(str(tmp_path)).pipeline_class().__name__ == stock
