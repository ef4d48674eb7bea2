"""LightX2V's Turbo-SLA for MiniMax-H3: a plain LoRA without its alpha, and the attention that it was tuned for."""

import pytest
import tiny_models
import torch
from accuracy import assert_accurate
from published_weights import Example, by_formula, in_dtype, means, over_blocks, random, runs
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint.few_steps import h3

H3 = "diffusers.models.transformers.transformer_minimax_h3"
PROJECTIONS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")


def published(model, rank=128, spelling="{}.lora_{}.weight"):
    """Pairs of rank 128 for the six projections of every block, the refiner's too."""
    tensors, seeds = {}, iter(range(1000))
    for key, value in model.state_dict().items():
        layer = key.removesuffix(".weight")
        if "_blocks." in layer and layer.endswith(PROJECTIONS):
            tensors[spelling.format(layer, "A")] = random(rank, value.shape[1], seed=next(seeds), size=0.02)
            tensors[spelling.format(layer, "B")] = random(value.shape[0], rank, seed=next(seeds), size=0.2)
    return tensors


EXAMPLE = Example("minimax_h3", published)


def formula(model, tensors, inputs, before, scale, dtype):
    """W + scale B A; 15 % of the key blocks of 64 by their means for 128 queries, with all tokens before the video."""
    weights = {key: value.to(dtype) for key, value in model.state_dict().items()}
    for key in [key for key in tensors if ".lora_A." in key]:
        layer, pair = key.split(".lora_")[0], (tensors[key.replace("_A.", "_B.")], tensors[key])
        weights[f"{layer}.weight"] += scale * (pair[0].to(dtype) @ pair[1].to(dtype))
    model = model.to(dtype)
    model.load_state_dict(weights)

    def attend(layer, q, k, v, hidden):
        tokens = q.shape[2] - before
        queries, keys = ([before + run for run in runs(tokens, block)] for block in (128, 64))
        scores = means(q, queries) @ means(k, keys).mT
        count = max(1, int(0.15 * len(keys)))
        out = over_blocks(q, k, v, scores, count, queries, keys, always=[torch.arange(before)])
        out[:, :, :before] = (q[:, :, :before] @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return out

    attentions = [block.attn for block in model.transformer_blocks]
    return by_formula(model, in_dtype(inputs, dtype), attend, attentions, where=H3)


@pytest.mark.parametrize("rank", [128, 32])
@pytest.mark.parametrize("latent", [(5, 14, 18), (9, 6, 22)], ids=str)
def test_it_computes_the_authors_function(latent, rank, tmp_path):
    """Its scale is 128 over the rank; the tokens before the video are exact here."""
    tiny = tiny_models.module("minimax_h3")
    model, inputs = tiny.build(), tiny.inputs(tiny.layout((), latent))
    tensors = published(model, rank)
    save_file(tensors, tmp_path / "weights.safetensors")
    plain, exact = (
        formula(tiny.build(), tensors, inputs, tiny.BEFORE, 128 / rank, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    with dit_accel.load(model, tmp_path / "weights.safetensors") as accel, torch.no_grad():
        config = accel.setting.config
        assert (accel.setting.method, config.topk, config.topp) == ("sparge", 0.15, 0.0)
        assert accel.trained.sampler == h3((1.0, 0.75, 0.5, 0.25), 6.0) and "alpha" in str(accel.report())
        assert_accurate("turbosla", model(**inputs, return_dict=False)[0], plain, exact)


@pytest.mark.parametrize(
    "spelling",
    [
        "transformer.{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.default.weight",
        "model.diffusion_model.{}.lora_{}.weight",
    ],
)
def test_prefixes_of_other_tools_are_read(spelling, tmp_path):
    tiny = tiny_models.module("minimax_h3")
    loaded = []
    for names in ("{}.lora_{}.weight", spelling):
        model = tiny.build()
        save_file(published(model, spelling=names), tmp_path / "weights.safetensors")
        dit_accel.load(model, tmp_path / "weights.safetensors")
        loaded.append(dict(model.state_dict()))
    assert all(torch.equal(value, loaded[1][key]) for key, value in loaded[0].items())


def test_levels_are_those_of_five_points_under_its_shifts():
    sampler = h3((1.0, 0.75, 0.5, 0.25), 6.0)
    assert sampler.sigmas == pytest.approx((1, 18 / 19, 6 / 7, 2 / 3))
    assert sampler.others["audio_scheduler"] == pytest.approx((1, 0.9, 0.75, 0.5))
