"""MiniMax-H3 from the command line to the file: Diffusers' own blocks, components of the real classes in small."""

import importlib.util
import json
import re
import shlex
import shutil

import imageio.v2
import pytest
import tiny_models
import torch
import transformers
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines import MiniMaxH3Blocks
from messages import says
from published_weights import section
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

import dit_accel
from dit_accel.generation import modular
from dit_accel.tokens import TokenGrid

# The shortest video that the pipeline makes; 3 noise levels are 2 steps.
SIZE = ["--frames", "124", "--height", "64", "--width", "96", "--steps", "3"]
PROMPT = "a red circle"
WINDOW = "gna:window=5x1x2"
BEFORE = len(PROMPT) + 2 * 207  # a token for each letter, and two channels of sound, 40 tokens a second
SPECIAL = ("<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def text_encoder():
    """Of 51 layers: the pipeline reads what the 50th makes."""
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 51, "num_attention_heads": 2}
    words |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300}
    words |= {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    pictures = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pictures |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = dict(zip(names, range(257, 261), strict=True))
    config = transformers.Qwen3VLConfig(text_config=words, vision_config=pictures, **tokens)
    return transformers.Qwen3VLForConditionalGeneration(config)


@pytest.fixture(scope="module")
def processor():
    """It prepares pictures and videos, for which it needs torchvision; text alone takes its kinds of tokens."""
    stub = transformers.Qwen3VLProcessor.__new__(transformers.Qwen3VLProcessor)
    stub.image_token_id, stub.video_token_id = 257, 258
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Qwen3VLProcessor, "from_pretrained", lambda *args, **kwargs: stub)
        patch.setattr(transformers.Qwen3VLProcessor, "save_pretrained", lambda *args, **kwargs: None)
        yield stub


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    vocabulary = {word: number for number, word in enumerate((*sorted(ByteLevel.alphabet()), *SPECIAL))}
    video = {"latent_channels": 4, "block_out_channels": [4] * 6, "layers_per_block": 1, "norm_num_groups": 2}
    video |= {"decoder_num_layers": 1, "decoder_num_attention_heads": 1, "decoder_attention_head_dim": 8}
    sound = {"encoder_dim": 2, "encoder_rates": [2, 2], "latent_dim": 12, "latent_channels": 6, "sampling_rate": 160}
    sound |= {"num_attention_heads": 2, "decoder_dim": 8, "decoder_rates": [2, 2], "decoder_kernel_sizes": [4, 4]}
    pipe = MiniMaxH3Blocks().init_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.update_components(
            vae=AutoencoderKLMiniMaxH3(**video, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
            audio_vae=AutoencoderKLMiniMaxH3Audio(**sound, latents_mean=[0.0] * 6, latents_std=[1.0] * 6),
            transformer=tiny_models.module("minimax_h3").build(),
            text_encoder=text_encoder(),
            tokenizer=transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[]),
            processor=processor,
            scheduler=MiniMaxH3Scheduler(),
            audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        )
    path = tmp_path_factory.mktemp("modular") / "minimax-h3"
    pipe.save_pretrained(str(path), overwrite_modular_index=True)
    return path


def test_generate(run, folder, tmp_path, capfd):
    """What precedes the video is exact both ways. The sound is not written, which is said."""
    output = tmp_path / "clip.mp4"
    options = ("--prompt", PROMPT, "--method", WINDOW, "--output", output)
    assert run("generate", "--model", folder, *SIZE, *options) == 0
    assert says(capfd.readouterr().err, "MiniMaxH3ModularPipeline sound", output)
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["pipeline"] == "MiniMaxH3ModularPipeline"
    assert record["runs"]["accelerated"]["steps"] == 2
    with imageio.v2.get_reader(output, format="FFMPEG") as reader:
        assert (reader.count_frames(), reader.get_meta_data()["fps"]) == (124, 24)

    grid = TokenGrid(37, 2, 3, text=BEFORE, text_first=True)
    plan = dit_accel.plan("gna", grid, window=(5, 1, 2))
    mask = plan.token_mask()
    assert mask[:BEFORE].all() and mask[:, :BEFORE].all() and not mask[BEFORE:, BEFORE:].all()
    assert record["report"]["grids"] == {str(grid): plan.density}
    assert f"{BEFORE} tokens of text, conditions and sound are dense both ways" in record["report"]["notes"]
    assert {layer["sparse_calls"] for layer in record["report"]["layers"]} == {2}


def test_eval(run, folder, tmp_path):
    """One step alone is refused, so the warm-up runs the whole loop."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(PROMPT)
    options = ("--prompts", prompts, "--method", WINDOW, "--dense-steps", "1", "--metric", "psnr", "--output", output)
    assert run("eval", "--model", folder, *SIZE, *options) == 0
    dense, sparse = json.loads((output / "summary.json").read_text())["rows"]
    density = dit_accel.plan("gna", TokenGrid(37, 2, 3, text=BEFORE, text_first=True), window=(5, 1, 2)).density
    assert dense["density"] == 1
    assert sparse["density"] == pytest.approx((1 + density) / 2)


@pytest.fixture(params=["fasth3", "turbosla"])
def adapter(request, folder, root, tmp_path):
    """An adapter's name, and a file of it that fits the model."""
    spec = importlib.util.spec_from_file_location(request.param, root / f"tests/checkpoint/test_{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors = module.published(MiniMaxH3Transformer3DModel.from_pretrained(folder / "transformer"))
    save_file(tensors, tmp_path / "adapter.safetensors", module.EXAMPLE.metadata(tensors))
    return request.param, tmp_path / "adapter.safetensors"


def test_generate_with_an_adapter_takes_its_steps(run, folder, adapter, tmp_path):
    name, file = adapter
    output = tmp_path / "clip.mp4"
    size = [word for word in SIZE if word not in ("--steps", "3")]
    assert run("generate", "--model", folder, *size, "--prompt", PROMPT, "--load", file, "--output", output) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["call"]["num_inference_steps"] == 5 and record["runs"]["accelerated"]["steps"] == 4
    assert {layer["sparse_calls"] for layer in record["report"]["layers"]} == {4}
    notes = "\n".join(record["report"]["notes"])
    assert says(notes, name, "scheduler:", "audio_scheduler:", "FewStepScheduler", "num_inference_steps=5")


def test_an_adapter_brings_both_schedulers_and_takes_them_back(folder, adapter):
    """And a call's number of steps, which the call may still name."""
    pipe = modular.load(folder, None, {"default": torch.float32}, ("prompt",), None, configs={}, parts={})
    before, kind = (pipe.scheduler, pipe.audio_scheduler), type(pipe)
    with dit_accel.load(pipe, adapter[1]) as accel:
        schedulers = pipe.scheduler, pipe.audio_scheduler
        for scheduler, sigmas in zip(
            schedulers, (accel.trained.sampler.sigmas, *accel.trained.sampler.others.values()), strict=True
        ):
            scheduler.set_timesteps(5)
            torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0.0]))
        for chosen, calls in (({}, 4), ({"num_inference_steps": 2}, 5)):
            pipe(prompt=PROMPT, num_frames=124, height=64, width=96, **chosen)
            assert accel.report().calls == {"transformer": calls}
    assert (pipe.scheduler, pipe.audio_scheduler) == before and type(pipe) is kind


def test_the_page_of_published_weights(run, root, folder, adapter, monkeypatch, tmp_path, capfd):
    """Its lines, with the adapter under the names that they use."""
    program, (command,) = section(root, "MiniMax-H3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MiniMaxAI").mkdir()
    (tmp_path / "MiniMaxAI" / "MiniMax-H3").symlink_to(folder)
    file = tmp_path / re.search(r'load\(pipe, "(.*)"\)', program)[1]
    file.parent.mkdir(parents=True)
    for path in (file, tmp_path / "adapter_model.safetensors"):
        shutil.copy(adapter[1], path)
    names = {}
    exec(f"import dit_accel\nfrom diffusers import ModularPipeline\n{program}", names)
    assert set(names["accel"].transformers) == {"transformer"}
    names["accel"].remove()
    assert run(*shlex.split(command)[1:], *SIZE[:6]) == 0
    assert (tmp_path / "cat.mp4").is_file()
    assert run("doctor", "--model", "MiniMaxAI/MiniMax-H3", "--load", "adapter_model.safetensors") == 0
    assert says(capfd.readouterr().out, adapter[0], "num_inference_steps=5", "fits MiniMaxAI/MiniMax-H3")
