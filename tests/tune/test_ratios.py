"""MagCache's ratios from prompts to a file that `--cache` takes."""

import json

import pytest

import dit_accel
from dit_accel.caches.ratios import mag_ratios
from dit_accel.tune.ratios import mean

SMALL = ("--model", "demo", "--frames", 5, "--height", 32, "--width", 32, "--steps", 4)


def test_the_mean_is_over_runs_and_the_transformers_that_ran():
    first = {"transformer": {"cond": [1.0, 0.9], "uncond": [1.0, 0.8]}}
    second = {"transformer": {"cond": [1.0, 1.1], "uncond": [1.0, 1.0]}}
    ratios = mean([first, second], "here")
    assert ratios.cond == (1.0, 1.0) and ratios.uncond == (1.0, 0.9) and ratios.source == "here"
    pair = {"transformer": {"cond": [1.0, 0.9]}, "transformer_2": {"cond": [None, None, 1.2, 0.8]}}
    assert mean([pair], "here").cond == (1.0, 0.9, 1.2, 0.8)
    with pytest.raises(dit_accel.DitAccelError, match="has 3"):
        mean([{"transformer": {str(i): [1.0] for i in range(3)}}], "here")


def test_from_prompts_to_a_file_that_generate_and_eval_take(cli, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for _ in range(2):  # the same command again replaces its file
        outcome = cli("tune", *SMALL, "--prompts", "prompts.txt", "--cache", "mag:threshold=0.2", "--output", "out")
        assert outcome.status == 0, outcome.err
    ratios = mag_ratios("out/mag_ratios.json")
    assert len(ratios.cond) == 4 and ratios.cond[0] == 1.0 and not ratios.uncond
    assert json.loads((tmp_path / "out" / "mag_ratios.json").read_text())["prompts"] == ["a red circle"]
    cache = outcome.out.split("--cache ")[-1].strip()
    assert cache == "mag:threshold=0.2,mag_ratios=out/mag_ratios.json"

    outcome = cli("generate", *SMALL, "--cache", cache, "--output", "cached.mp4")
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "cached.json").read_text())
    assert record["setting"]["method"] == "dense" and record["setting"]["cache"]["name"] == "mag"
    options = ("--prompts", "prompts.txt", "--cache", "none", "--cache", cache, "--method", "gna:window=0.5")
    outcome = cli("eval", *SMALL, *options, "--output", "evaluation")
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["baseline", "gna:window=0.5", f"gna:window=0.5 cache={cache}"]
