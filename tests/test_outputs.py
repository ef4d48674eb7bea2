"""No verb removes or replaces what it did not write: files, folders and links beside an output, in every verb."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from dit_accel import files
from dit_accel.errors import DitAccelError
from dit_accel.generation.output import write_frames, write_png

SMALL = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2)
METHOD = ("--method", "radial:decay=0.2")


def content(folder):
    """Every path below a folder with its bytes or its target."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def make_foreign(path, kind):
    """Something that somebody else put at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("ten years")
    elif kind == "link":
        path.symlink_to(path.with_name("elsewhere"))
    else:
        path.write_text('{"mine": true}\n')


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".png"])
def test_pictures_and_videos_are_known_by_their_content(tmp_path, ending):
    frames = np.random.default_rng(0).integers(0, 255, (1 if ending == ".png" else 5, 32, 48, 3), dtype=np.uint8)
    write_frames(tmp_path / f"a{ending}", frames, 8)
    assert files.is_ours(tmp_path / f"a{ending}")
    if ending != ".mp4":
        Image.fromarray(frames[0]).save(tmp_path / f"b{ending}")
        assert not files.is_ours(tmp_path / f"b{ending}")


def test_what_lies_at_the_end_of_a_long_file_is_found(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, Image.new("RGB", (8, 8)))
    path.write_bytes(bytes(3 * files.SEARCHED) + path.read_bytes())
    assert files.is_ours(path)
    path.write_bytes(path.read_bytes() + bytes(3 * files.SEARCHED))
    assert not files.is_ours(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_came_during_the_work_is_not_replaced(tmp_path, kind):
    with pytest.raises(DitAccelError, match=r"o\.json"), files.staged(tmp_path / "o.mp4") as stage:
        (stage / "o.mp4").write_text(files.MARK)
        (stage / "o.json").write_text(files.MARK)
        make_foreign(tmp_path / "o.json", kind)
        before = content(tmp_path / "o.json") if kind == "folder" else None
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"], "all files come, or none"
    assert before is None or content(tmp_path / "o.json") == before


@pytest.mark.parametrize("present", ["notes.txt", "weights.safetensors"])
def test_a_folder_is_replaced_only_if_it_is_ours(tmp_path, present):
    make_foreign(tmp_path / "step-1" / present, "file")
    before = content(tmp_path)
    with pytest.raises(DitAccelError, match=present), files.staged(tmp_path / "step-1") as stage:
        (stage / "step-1").mkdir()
        (stage / "step-1" / "weights.safetensors").write_text(files.MARK)
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", ["o.mp4", "o.json", "o-dense.mp4", "o-compare.mp4"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_generate_refuses_before_it_runs(cli, demo, tmp_path, name, kind, overwrite):
    make_foreign(tmp_path / name, kind)
    before = content(tmp_path)
    outcome = cli("generate", *SMALL, *METHOD, "--compare", *overwrite, "--output", tmp_path / "o.mp4")
    assert outcome.status == 2 and name in outcome.err and outcome.out == ""
    assert content(tmp_path) == before


def test_generate_replaces_its_own_output_when_asked(cli, demo, tmp_path):
    options = ("generate", *SMALL, *METHOD, "--output", tmp_path / "o.gif")
    assert cli(*options, "--seed", 1).status == 0
    before = content(tmp_path)
    refused = cli(*options, "--seed", 2)
    assert refused.status == 2 and "--overwrite" in refused.err
    assert content(tmp_path) == before
    assert cli(*options, "--seed", 2, "--overwrite").status == 0
    assert json.loads((tmp_path / "o.json").read_text())["request"]["seed"] == 2
    assert (tmp_path / "o.gif").read_bytes() != before[tmp_path / "o.gif"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", ["o.jsonl", "o-0001.gif", "o-0001.json"])
def test_a_batch_refuses_before_it_runs(cli, demo, tmp_path, name, kind):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    make_foreign(tmp_path / name, kind)
    before = content(tmp_path)
    outcome = cli("generate", *SMALL, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "o.gif")
    assert outcome.status == 2 and name in outcome.err
    assert content(tmp_path) == before


def test_a_batch_replaces_outputs_of_other_options_when_asked(cli, demo, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ("generate", *SMALL, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "o.gif")
    assert cli(*options, "--seed", 1).status == 0
    refused = cli(*options, "--seed", 2)
    assert refused.status == 2 and "--overwrite" in refused.err
    assert cli(*options, "--seed", 2, "--overwrite").status == 0
    assert json.loads((tmp_path / "o-0000.json").read_text())["request"]["seed"] == 2
    assert "0 of 1 prompts to do" in cli(*options, "--seed", 2).out


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", ["report.html", "summary.json", "summary.md", "pareto.png", "results.jsonl"])
def test_eval_refuses_before_it_runs(cli, demo, tmp_path, name, kind):
    make_foreign(tmp_path / name, kind)
    before = content(tmp_path)
    outcome = cli("eval", *SMALL, *METHOD, "--metric", "psnr", "--output", tmp_path)
    assert outcome.status == 2 and name in outcome.err
    assert content(tmp_path) == before


def test_a_copy_of_results_is_left_alone(tmp_path):
    from dit_accel.eval.samples import Results

    (tmp_path / "results-before-tuning.jsonl").write_text("mine\n")
    results = Results(tmp_path)
    results.read()
    results.rewrite([])
    assert results.damaged == []
    assert (tmp_path / "results-before-tuning.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", ["README.md", "accelerator.json", "losses.jsonl", "pytorch_lora_weights.safetensors"])
def test_train_refuses_before_it_runs(cli, demo, tmp_path, name, kind):
    make_foreign(tmp_path / name, kind)
    before = content(tmp_path)
    size = ("--frames", 5, "--height", 32, "--width", 48)
    options = ("--data", "clips", "--count", 1, *size, "--method", "sla:topk=0.3,block=16", "--steps", 1)
    outcome = cli("train", *options, "--output", tmp_path)
    assert outcome.status == 2 and name in outcome.err
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize(
    ("verb", "option", "name"),
    [
        (("plan", *METHOD, "--grid", "4x8x8"), "--image", "a.png"),
        (("bench", "--shape", "cpu"), "--picture", "a.png"),
        (("bench", "--shape", "cpu", "--rows", "cpu/dense/1/float32/forward"), "--profile", "a.txt"),
        (
            ("train", "--data", "clips", "--method", "gna", "--budget", 0.5, "--candidate", "window=3"),
            "--search",
            "a.json",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_named_files_are_refused_before_the_work(cli, demo, tmp_path, monkeypatch, verb, option, name, kind):
    monkeypatch.chdir(tmp_path)
    make_foreign(tmp_path / name, kind)
    before = content(tmp_path)
    outcome = cli(*verb, option, name)
    assert outcome.status == 2 and name in outcome.err
    assert content(tmp_path) == before


@pytest.mark.parametrize("present", ["accelerator.json", "accelerator.safetensors", "accelerator_ratios.json"])
def test_saving_replaces_no_foreign_file(tmp_path, tiny_wan, present):
    from dit_accel import accelerate

    make_foreign(tmp_path / present, "file")
    before = content(tmp_path)
    with accelerate(tiny_wan(), "sla", block=16) as accel, pytest.raises(DitAccelError, match=present):
        accel.save_pretrained(tmp_path)
    assert content(tmp_path) == before


def test_old_checkpoints_go_and_what_lies_in_them_stays(tmp_path):
    import torch

    from dit_accel.train import state

    parts = {name: {"w": torch.zeros(1)} for name in state.PARTS}
    for step in (1, 2):
        state.save(tmp_path, step, parts, {})
    (tmp_path / "step-00000001" / "notes.txt").write_text("the good one")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001-good")
    (tmp_path / "step-00000002" / "notes.txt").write_text("not so good")
    for step in (3, 4):
        state.save(tmp_path, step, parts, {})
    names = {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir()}
    assert names == {"step-00000001-good": 5, "step-00000002": 1, "step-00000003": 4, "step-00000004": 4}


def test_a_last_row_without_a_newline_is_kept(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": 2}')
    files.append(tmp_path / "rows.jsonl", {"c": 3})
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n'
