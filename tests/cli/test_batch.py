"""`dit-accel generate --prompts`: shares, going on, the manifest."""

import json
import os
import subprocess
import sys

import pytest
from launching import TWO_PROCESSES
from messages import says

from dit_accel.generation import sampling

SMALL = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2, "--method", "gna:window=0.5")
PROMPTS = ["a red square", "a blue circle", "a green triangle", "", "ein gelber Stern ★", "a red square"]
LISTED = [prompt for prompt in PROMPTS if prompt]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def manifest(folder):
    return [json.loads(line) for line in (folder / "shot.jsonl").read_text().splitlines()]


def outputs(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("shot-*.gif")}


def test_each_prompt_is_made_as_alone(cli, demo, prompts, tmp_path):
    folder = tmp_path / "new" / "folder"
    outcome = cli("generate", *SMALL, "--prompts", prompts, "--output", folder / "shot.gif")
    assert outcome.status == 0, outcome.err
    assert "5 of 5" in outcome.out
    names = [f"shot-{i:04d}" for i in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["shot.jsonl", *(f"{name}.{ending}" for name in names for ending in ("gif", "json"))]
    )
    listed = manifest(folder)
    assert [entry["prompt"] for entry in listed] == LISTED
    assert [(entry["index"], entry["output"], entry["record"], entry["done"]) for entry in listed] == [
        (i, f"{name}.gif", f"{name}.json", True) for i, name in enumerate(names)
    ]
    assert all(entry["seconds"] > 0 for entry in listed)
    assert cli("generate", *SMALL, "--prompt", LISTED[3], "--output", tmp_path / "alone.gif").status == 0
    assert (tmp_path / "alone.gif").read_bytes() == (folder / "shot-0003.gif").read_bytes()
    record = json.loads((folder / "shot-0003.json").read_text())
    assert record["call"]["prompt"] == LISTED[3]
    assert (record["report"]["sparse_calls"], record["report"]["dense_calls"]) == (4, 0)


def test_the_first_prompt_warms_up_for_all(cli, demo, prompts, tmp_path, monkeypatch):
    steps, call = [], sampling.call

    def note(pipe, arguments, *seeds, **seed):
        steps.append(arguments["num_inference_steps"])
        return call(pipe, arguments, *seeds, **seed)

    monkeypatch.setattr(sampling, "call", note)
    outcome = cli("generate", *SMALL, "--prompts", prompts, "--compare", "--output", tmp_path / "shot.gif")
    assert outcome.status == 0, outcome.err
    assert steps == [1, 1] + [2, 2] * len(LISTED)
    for entry in manifest(tmp_path):
        record = json.loads((tmp_path / entry["record"]).read_text())
        seconds = entry["seconds"], entry["dense_seconds"]
        assert seconds == tuple(record["runs"][name]["seconds"] for name in ("accelerated", "dense"))
        compared = {name: entry[name] for name in ("speedup", "denoising_speedup", "psnr", "ssim")}
        assert compared == record["comparison"]
        (line,) = [line for line in outcome.out.splitlines() if says(line, tmp_path / entry["output"], "PSNR", "SSIM")]
        assert says(line, *(f"{number:.2f}" for number in (*seconds, entry["speedup"])), f"{entry['ssim']:.3f}")


def test_again_makes_only_what_is_missing(cli, demo, prompts, tmp_path):
    command = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*command).status == 0
    before = outputs(tmp_path)
    (tmp_path / "shot-0001.json").unlink()
    (tmp_path / "shot-0002.json").unlink()
    (tmp_path / "shot-0002.gif").unlink()
    (tmp_path / "shot-0003.gif").write_bytes(b"")  # a file that a full disk cut off
    (tmp_path / ".dit-accel-shot-0002.gif.abc").mkdir()
    (tmp_path / "shot.jsonl").unlink()
    outcome = cli(*command)
    assert "3 of 5" in outcome.out
    after = outputs(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    made_again = {name for name in before if before[name][0] != after[name][0]}
    assert made_again == {f"shot-000{i}.gif" for i in (1, 2, 3)}
    assert all(entry["done"] for entry in manifest(tmp_path))
    assert not list(tmp_path.glob(".dit-accel-*"))
    assert "0 of 5" in cli(*command).out


def test_other_options_are_refused(cli, demo, prompts, tmp_path):
    command = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*command).status == 0
    outcome = cli(*command, "--seed", 3)
    assert outcome.status == 2
    assert says(outcome.err, "--seed 0 3")
    for options, message in (
        (("--guidance", 2), "--guidance 2.0"),
        (("--compare",), "--compare"),
        (("--dense-layers", "0,1"), "--dense-layers 0,1"),
    ):
        outcome = cli(*command, *options)
        assert outcome.status == 2
        assert says(outcome.err, message) and not any(word in outcome.err for word in ("None", "True", "False"))
    prompts.write_text("\n".join(reversed(PROMPTS)))
    assert says(cli(*command).err, "--prompt")


def test_bad_prompts_are_refused(cli, demo, tmp_path):
    file = tmp_path / "prompts.txt"
    for content, reason in ((b" \n\n", ""), (b"\xff\xfe", "'utf-8'")):
        file.write_bytes(content)
        outcome = cli("generate", *SMALL, "--prompts", file, "--output", tmp_path / "shot.gif")
        assert (outcome.status, says(outcome.err, "--prompts", file, reason)) == (2, True), outcome.err
    assert says(cli("generate", "--prompts", tmp_path / "none.txt").err, "--prompts none.txt")
    assert says(cli("generate", "--prompts", file, "--prompt", "x").err, "--prompt --prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_accelerate_launch_shares_the_prompts(wan_folder, prompts, tmp_path, root):
    arguments = ["generate", "--model", wan_folder, *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif"]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, "-m", "dit_accel", *map(str, arguments)],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"{rank} of 2" in done.stdout
    assert [(entry["prompt"], entry["done"]) for entry in manifest(tmp_path)] == [(prompt, True) for prompt in LISTED]
    assert len(outputs(tmp_path)) == len(LISTED)
