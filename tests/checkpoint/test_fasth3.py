"""FastH3's adapter under its published names: what MiniMax-H3 computes with it, its sampler, and what it must hold."""

import re

import pytest
import tiny_models
import torch
from accuracy import assert_accurate
from published_weights import Example, by_formula, in_dtype, random, vsa
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint.few_steps import h3
from dit_accel.errors import DitAccelError

RANK, HEADS, INNER, HIDDEN = 64, 2, 32, 24
H3 = "diffusers.models.transformers.transformer_minimax_h3"
SAMPLER = h3((0.999, 0.749, 0.5, 0.25), 12.0)
FACTORS = re.compile(
    r"(transformer_blocks|token_refiner\.refiner_blocks)\.\d+\..*(to_|ff|adaln).*weight|proj_in.weight"
)


def gates(layers=2):
    return [random(INNER, HIDDEN, seed=40 + i, size=0.5) for i in range(layers)]


def published(model, gated=True):
    """Pairs of rank 64, differences of what has no rank, both for one layer, and the gates."""
    tensors, seeds = {}, iter(range(1000))
    for key, value in model.state_dict().items():
        layer, ending = key.rsplit(".", 1)
        if FACTORS.fullmatch(key):
            tensors[f"{layer}.lora_A.weight"] = random(RANK, value.shape[1], seed=next(seeds), size=0.02)
            tensors[f"{layer}.lora_B.weight"] = random(value.shape[0], RANK, seed=next(seeds), size=0.3)
        if not FACTORS.fullmatch(key) or layer == "proj_in":
            tensors[f"{layer}.{'diff' if ending == 'weight' else 'diff_b'}"] = random(
                *value.shape, seed=next(seeds), size=0.05
            )
    for layer, gate in enumerate(gates() if gated else ()):
        tensors[f"transformer_blocks.{layer}.attn.to_gate_compress.set_weight"] = gate
    return tensors


def metadata(tensors, name="FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree"):
    """As FastVideo's tools write it, with the number of tensors of each kind."""
    counts = {
        "low_rank_tensors": sum(".lora_" in key for key in tensors),
        "diff_tensors": sum(key.endswith((".diff", ".diff_b")) for key in tensors),
        "set_weight_tensors": sum(key.endswith(".set_weight") for key in tensors),
    }
    return {"format": "fastvideo-lora-v2", "finetuned_model": name} | {key: str(count) for key, count in counts.items()}


EXAMPLE = Example("minimax_h3", published, metadata)


def tuned(weights, tensors, dtype):
    """W + B A, then the differences."""
    new = {}
    for key, value in weights.items():
        layer, ending = key.rsplit(".", 1)
        new[key] = value.to(dtype)
        if f"{layer}.lora_A.weight" in tensors and ending == "weight":
            new[key] = new[key] + tensors[f"{layer}.lora_B.weight"].to(dtype) @ tensors[f"{layer}.lora_A.weight"].to(
                dtype
            )
        difference = tensors.get(f"{layer}.{'diff' if ending == 'weight' else 'diff_b'}")
        if difference is not None:
            new[key] = new[key] + difference.to(dtype)
    return new


def formula(model, tensors, inputs, grid, segments, dtype, sparsity=0.9):
    weights = tuned(model.state_dict(), tensors, dtype)
    model = model.to(dtype)
    model.load_state_dict(weights)

    def attend(layer, q, k, v, hidden):
        gate = (hidden @ gates()[layer].to(dtype).T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return vsa(q, k, v, gate, grid, sparsity, segments=segments)

    attentions = [block.attn for block in model.transformer_blocks]
    return by_formula(model, in_dtype(inputs, dtype), attend, attentions, where=H3)


@pytest.mark.parametrize("dense", [False, True], ids=["gates", "no gates"])
def test_the_file_says_what_it_was_tuned_for(dense, tmp_path):
    model = tiny_models.module("minimax_h3").build()
    tensors = published(model, gated=not dense)
    save_file(tensors, tmp_path / "a.safetensors", metadata(tensors))
    with dit_accel.load(model, tmp_path / "a.safetensors") as accel:
        assert accel.setting.method == ("dense" if dense else "proxy")
        assert accel.trained.sampler == SAMPLER and accel.trained.call == {"num_inference_steps": 5}
    save_file(tensors, tmp_path / "b.safetensors", metadata(tensors, "somebody/a-style"))
    with dit_accel.load(model, tmp_path / "b.safetensors") as accel:
        assert accel.trained.sampler is None and not accel.trained.call


@pytest.mark.parametrize("keyframes", [(), ("first", "last")], ids=["t2va", "fl2va"])
@pytest.mark.parametrize("latent", [(5, 14, 18), (4, 16, 8), (9, 6, 22)], ids=str)
def test_it_computes_the_authors_function(latent, keyframes, tmp_path):
    """At sizes that tiles do not divide, and with a segment of several runs before the video."""
    tiny = tiny_models.module("minimax_h3")
    model, inputs = tiny.build(), tiny.inputs(tiny.layout(keyframes, latent))
    grid = latent[0], latent[1] // 2, latent[2] // 2
    segments = [tiny.TEXT, len(keyframes) * grid[1] * grid[2], 2 * tiny.SOUND]
    tensors = published(model)
    save_file(tensors, tmp_path / "weights.safetensors", metadata(tensors))
    plain, exact = (
        formula(tiny.build(), tensors, inputs, grid, [n for n in segments if n], dtype)
        for dtype in (torch.float32, torch.float64)
    )
    with dit_accel.load(model, tmp_path / "weights.safetensors"), torch.no_grad():
        assert_accurate("fasth3", model(**inputs, return_dict=False)[0], plain, exact)


def test_published_levels():
    """12 p / (1 + 11 p) of each position, and 3 p / (1 + 2 p) for the sound, to six digits."""
    assert SAMPLER.sigmas == pytest.approx((0.999917, 0.972833, 0.923077, 0.8), abs=5.1e-7)
    assert SAMPLER.others["audio_scheduler"] == pytest.approx((0.999666, 0.899520, 0.75, 0.5), abs=5.1e-7)


@pytest.mark.parametrize("key", ["low_rank_tensors", "diff_tensors", "set_weight_tensors"])
def test_a_file_holds_as_many_tensors_as_it_says(key, tmp_path):
    model = tiny_models.module("minimax_h3").build()
    tensors = published(model)
    save_file(tensors, tmp_path / "weights.safetensors", metadata(tensors) | {key: "7"})
    with pytest.raises(DitAccelError, match=f"{key}=7"):
        dit_accel.load(model, tmp_path / "weights.safetensors")
