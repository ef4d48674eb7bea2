import json
from dataclasses import replace

import pytest
import torch
from messages import names

from dit_accel.pipelines.demo import clips, load_demo
from tools.demo.forward import PROMPT_LENGTH, TEXT_SLOTS, predict
from tools.demo.model import build_pipeline
from tools.demo.recipes import RECIPES, Recipe, Stage
from tools.demo.train import Trainer, export, main

SMALL = {"dim": 64, "layers": 2, "ffn_dim": 128}
STAGES = (Stage("a", 6, 8e-3, 7e-3, ((5, 32, 32, 4), (5, 32, 48, 4))), Stage("b", 100, 7e-3, 7e-3, ((5, 32, 32, 8),)))


def trainer(seed: int = 0) -> Trainer:
    torch.manual_seed(0)
    return Trainer(build_pipeline(**SMALL), Recipe(STAGES, model=SMALL), seed=seed)


def test_a_seed_gives_the_same_weights_bit_for_bit():
    first, second, other = trainer(), trainer(), trainer(seed=1)
    for run in (first, second, other):
        for _ in range(3):
            run.train_step()
    for name, weight in first.average.items():
        assert torch.equal(weight, second.average[name]), name
    name = "transformer.proj_out.weight"
    assert not torch.equal(first.average[name], other.average[name])


def test_training_lowers_the_losses():
    run = trainer()
    losses = torch.stack([run.train_step() for _ in range(60)])
    first, last = losses[:10].mean(0), losses[-10:].mean(0)
    assert losses.shape == (60, 4) and last[0] < 0.8 * first[0] and (last[1:] < first[1:]).all()


def test_learning_rate_follows_the_stages():
    run = trainer()
    stage, rate = run.schedule()
    assert (stage.name, rate) == ("a", pytest.approx(8e-3 / 100))
    run.step = 6
    assert run.schedule()[0].name == "b"


def test_the_training_forward_equals_the_pipelines():
    torch.manual_seed(0)
    pipe = build_pipeline(dim=128, layers=2, ffn_dim=128)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.05)
    latents, timestep = torch.randn(2, 96, 3, 8, 12), torch.tensor([900.0, 300.0])
    prompts = ["a red circle moves right on a blue background", ""]
    with torch.no_grad():
        text = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=PROMPT_LENGTH)
        stock = pipe.transformer(latents, timestep, text, return_dict=False)[0]
        run = Trainer(pipe, Recipe(STAGES))
        short = run.embed(run._tokens(prompts))
        fast, seen = predict(pipe.transformer, latents, timestep, short, 1)
    assert short.shape[1] == TEXT_SLOTS and seen.shape == (2, 3 * 4 * 6, 128)
    torch.testing.assert_close(short, text[:, :TEXT_SLOTS])
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


def test_prompts_are_dropped_paraphrased_and_mostly_plain():
    run = trainer()
    which = torch.zeros(1000, dtype=torch.long)
    drawn = run._sample_prompts(which)
    caption, colour = run.prompts[0, 0], run.pipe.tokenizer.convert_tokens_to_ids(clips.scenes(False)[0].colour)
    empty = (drawn == run.empty).all(1)
    assert 60 <= empty.sum() <= 140
    assert 500 <= (drawn == caption).all(1).sum() <= 750
    assert (drawn[~empty] == colour).any(1).all()
    assert 0.05 < (drawn == run.unknown).any(1).float().mean() < 0.25


def test_a_caption_that_fills_all_slots_is_refused():
    with pytest.raises(ValueError, match=names("TEXT_SLOTS")):
        trainer()._tokens([" ".join(["red"] * 20)])


def test_export_writes_a_pipeline_that_loads(tmp_path):
    run = trainer()
    run.train_step()
    export(run, tmp_path / "weights")
    pipe = load_demo(folder=tmp_path / "weights")
    for name, weight in pipe.transformer.named_parameters():
        torch.testing.assert_close(weight.data, run.average[f"transformer.{name}"].bfloat16().float(), rtol=0, atol=0)


def test_a_run_leaves_weights_a_log_and_its_evaluation(tmp_path, monkeypatch):
    stage = Stage("only", 3, 1e-3, 1e-3, ((5, 32, 32, 2),))
    monkeypatch.setitem(RECIPES, "demo", replace(RECIPES["demo"], stages=(stage,), model=SMALL))
    main(["--output", str(tmp_path)])
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert row["step"] == 3 and row["stage"] == "only" and row["clips_a_second"] > 0
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
