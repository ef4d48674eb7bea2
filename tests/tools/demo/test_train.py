import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_accel.pipelines.demo import clips, load_demo
from tools.demo.fast_attention import PROMPT_LENGTH, TEXT_SLOTS, use_fast_attention
from tools.demo.model import build_pipeline
from tools.demo.train import Stage, Trainer, export

STAGES = (Stage("a", 6, 8e-3, 7e-3, ((5, 32, 32, 4), (5, 32, 48, 4))), Stage("b", 100, 7e-3, 7e-3, ((5, 32, 32, 8),)))


def trainer(seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(build_pipeline(dim=64, layers=2, ffn_dim=128), STAGES, seed=seed)


def test_a_resumed_run_gives_the_same_weights_bit_for_bit(tmp_path):
    whole = trainer()
    for _ in range(4):
        whole.train_step()
    whole.save(tmp_path / "checkpoint.safetensors")
    for _ in range(4):
        whole.train_step()

    resumed = trainer(seed=1)
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 4
    for _ in range(4):
        resumed.train_step()
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
        assert torch.equal(whole.average[name], resumed.average[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_training_lowers_the_loss():
    run = trainer()
    losses = [run.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_learning_rate_follows_the_stages():
    run = trainer()
    stage, rate = run.schedule()
    assert (stage.name, rate) == ("a", pytest.approx(8e-3 / 100))
    run.step = 6
    assert run.schedule()[0].name == "b"
    assert run.total_steps == 106


def test_training_attention_equals_the_pipelines():
    torch.manual_seed(0)
    pipe = build_pipeline(dim=128, layers=2, ffn_dim=128)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.05)
    latents, noise_level = torch.randn(2, 12, 3, 8, 8), torch.tensor([900.0, 300.0])
    prompts = ["a red circle moves right on a blue background", ""]
    with torch.no_grad():
        text = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=PROMPT_LENGTH)
        stock = pipe.transformer(latents, noise_level, text, return_dict=False)[0]
        run = Trainer(pipe, STAGES)
        short = run.embed(prompts)
        fast = pipe.transformer(latents, noise_level, short, return_dict=False)[0]
    assert short.shape[1] == TEXT_SLOTS
    torch.testing.assert_close(short, text[:, :TEXT_SLOTS])
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


def test_processors_go_on_every_block():
    pipe = build_pipeline(dim=64, layers=2, ffn_dim=64)
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, WanAttnProcessor)
    use_fast_attention(pipe.transformer)
    assert not any(isinstance(processor, WanAttnProcessor) for processor in pipe.transformer.attn_processors.values())


def test_prompts_are_dropped_paraphrased_and_mostly_plain():
    run = trainer()
    scene = clips.Scene("red", "circle", "right", "blue")
    prompts = [run.prompt(scene) for _ in range(1000)]
    assert 60 <= prompts.count("") <= 140
    assert 500 <= prompts.count(scene.caption) <= 750
    assert all("red" in prompt and "right" in prompt for prompt in prompts if prompt)


def test_a_caption_that_fills_all_slots_is_refused():
    with pytest.raises(ValueError, match="raise TEXT_SLOTS"):
        trainer().embed([" ".join(["red"] * 20)])


def test_export_writes_a_pipeline_that_loads(tmp_path):
    run = trainer()
    run.train_step()
    export(run, tmp_path / "weights")
    pipe = load_demo(folder=tmp_path / "weights")
    for name, weight in pipe.transformer.named_parameters():
        torch.testing.assert_close(weight.data, run.average[f"transformer.{name}"].bfloat16().float(), rtol=0, atol=0)
