"""Modular pipelines on the command line: the blocks that run decide arguments, components and progress bars."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, MiniMaxH3Transformer3DModel, WanTransformer3DModel
from diffusers.modular_pipelines import MiniMaxH3Blocks, MiniMaxH3ModularPipeline, WanBlocks
from messages import names, says

from dit_accel.errors import DitAccelError
from dit_accel.generation import modular, setup, sources
from dit_accel.pipelines import demo

SIZE = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Wan in Diffusers' modular format, with the embedded model's text encoder."""
    embedded, pipe = demo.load_demo(), WanBlocks().init_pipeline()
    codec = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    model = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "freq_dim": 16}
    model |= {"text_dim": embedded.text_encoder.config.d_model, "ffn_dim": 32, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.update_components(
            vae=AutoencoderKLWan(**codec, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
            transformer=WanTransformer3DModel(**model),
            text_encoder=embedded.text_encoder,
            tokenizer=embedded.tokenizer,
            scheduler=embedded.scheduler,
        )
    path = tmp_path_factory.mktemp("modular") / "wan"
    pipe.save_pretrained(str(path), overwrite_modular_index=True)
    return path


def test_generate_and_its_record(run, folder, tmp_path, capfd):
    method = "gna:window=2x1x2"
    output = tmp_path / "clip.mp4"
    assert run("generate", "--model", folder, *SIZE, "--method", method, "--compare", "--output", output) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["pipeline"] == "WanModularPipeline"
    assert record["runs"]["accelerated"]["steps"] == record["runs"]["dense"]["steps"] == 2
    assert {layer["sparse_calls"] for layer in record["report"]["layers"]} == {4}  # with guidance, two a step
    assert output.is_file() and "Error in block" not in capfd.readouterr().err


def test_eval(run, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    options = ["--prompts", prompts, "--method", "gna:window=2x1x2", "--metric", "psnr", "--output", tmp_path / "out"]
    assert run("eval", "--model", folder, *SIZE, *options) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["density"] < 1 for row in summary["rows"]] == [False, True]


def test_what_the_pipeline_does_not_take_is_refused_in_one_line(run, folder, tmp_path, capfd):
    assert run("generate", "--model", folder, *SIZE, "--guidance", "3") == 2
    assert says(capfd.readouterr().err, "WanModularPipeline --guidance")
    assert run("generate", "--model", folder, *SIZE, "--pipe", "max_sequence_length=none") == 2
    assert "max_sequence_length" in capfd.readouterr().err
    assert run("train", "--model", folder, "--recipe", "sla-demo", "--output", tmp_path / "trained") == 2
    assert "a modular pipeline" in capfd.readouterr().err


def test_a_component_that_is_missing(run, folder, tmp_path, capfd):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    index = copy / modular.INDEX
    index.write_text(index.read_text().replace(str(folder), str(copy)))
    assert run("generate", "--model", copy, *SIZE, "--output", tmp_path / "a.mp4") == 2
    assert says(capfd.readouterr().err, "load")


def test_minimax_h3_loads_what_the_call_needs():
    """Text to video and keyframes take one of the two transformers, references the other."""
    kind = MiniMaxH3ModularPipeline
    assert "image" not in modular.parameters(kind, ["prompt"])
    assert "image" in modular.parameters(kind, ["prompt", "image"])
    arguments = setup.call_arguments(kind, {}, {"prompt": "a cat", "num_frames": 124, "height": 768}, [])
    assert arguments == {"prompt": "a cat", "num_frames": 124, "height": 768}
    with pytest.raises(DitAccelError, match=names("--guidance")):
        setup.call_arguments(kind, {}, {"prompt": "a cat", "guidance_scale": 3.0}, [])


def test_a_component_of_another_repository(folder, tmp_path, monkeypatch):
    """Its settings are read there."""
    path = tmp_path / "index-only"
    path.mkdir()
    index = json.loads((folder / modular.INDEX).read_text())
    for name in ("transformer", "vae"):
        index[name][2] |= {"pretrained_model_name_or_path": "owner/model", "revision": "main"}
    (path / modular.INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(
        sources, "_fetch_json", lambda model, revision: {("owner/model", "main"): folder}[model, revision]
    )
    assert sources.find(str(path)).sizes() == sources.find(str(folder)).sizes()


def test_every_transformer_is_compiled(monkeypatch):
    """Whatever its name: MiniMax-H3 keeps the one for references under `transformer_ref`."""
    transformer, seen = tiny_minimax(), []
    monkeypatch.setattr(type(transformer), "compile_repeated_blocks", lambda self, **options: seen.append(self))
    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(transformer_ref=transformer)
    setup.prepare(pipe, (), vae_tiling=False, compile=True)
    assert seen == [transformer]


def tiny_minimax():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 1, "ffn_dim": 32}
    sizes |= {"num_refiner_layers": 1, "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 24, "rope_freq_dim": 2}
    return MiniMaxH3Transformer3DModel(**sizes, time_embed_dim=16)
