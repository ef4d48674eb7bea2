"""`dit-accel generate --prompts`: shares, going on after a kill, the manifest."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dit_accel import DitAccelError
from dit_accel.cli.batch import Process

SMALL = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2, "--method", "gna:window=0.5")
PROMPTS = ["a red square", "a blue circle", "a green triangle", "", "ein gelber Stern ★", "a red square"]
ASKED = [prompt for prompt in PROMPTS if prompt]


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
    assert "5 of 5 prompts to do" in outcome.out
    names = [f"shot-{i:04d}" for i in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["shot.jsonl", *(f"{name}.{ending}" for name in names for ending in ("gif", "json"))]
    )
    listed = manifest(folder)
    assert [entry["prompt"] for entry in listed] == ASKED
    assert [(entry["index"], entry["output"], entry["record"], entry["done"]) for entry in listed] == [
        (i, f"{name}.gif", f"{name}.json", True) for i, name in enumerate(names)
    ]
    assert all(entry["seconds"] > 0 for entry in listed)
    assert cli("generate", *SMALL, "--prompt", ASKED[3], "--output", tmp_path / "alone.gif").status == 0
    assert (tmp_path / "alone.gif").read_bytes() == (folder / "shot-0003.gif").read_bytes()
    record = json.loads((folder / "shot-0003.json").read_text())
    assert record["call"]["prompt"] == ASKED[3]
    assert (record["report"]["sparse_calls"], record["report"]["dense_calls"]) == (8, 0)


def test_again_makes_only_what_is_missing(cli, demo, prompts, tmp_path):
    asked = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*asked).status == 0
    before = outputs(tmp_path)
    (tmp_path / "shot-0001.json").unlink()
    (tmp_path / "shot-0002.json").unlink()
    (tmp_path / "shot-0002.gif").unlink()
    (tmp_path / ".dit-accel-shot-0002.abc").mkdir()
    (tmp_path / "shot.jsonl").unlink()
    outcome = cli(*asked)
    assert "2 of 5 prompts to do" in outcome.out
    after = outputs(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    assert {name for name in before if before[name][0] != after[name][0]} == {"shot-0001.gif", "shot-0002.gif"}
    assert all(entry["done"] for entry in manifest(tmp_path))
    assert not list(tmp_path.glob(".dit-accel-*"))
    assert "0 of 5 prompts to do" in cli(*asked).out


def test_other_options_are_refused(cli, demo, prompts, tmp_path):
    asked = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*asked).status == 0
    outcome = cli(*asked, "--seed", 3)
    assert outcome.status == 2
    assert "made with --seed 0, not 3" in outcome.err
    prompts.write_text("\n".join(reversed(PROMPTS)))
    assert "made with --prompt" in cli(*asked).err


def test_bad_prompts_are_refused(cli, demo, tmp_path):
    file = tmp_path / "prompts.txt"
    for content, message in ((b" \n\n", "holds no prompts"), (b"\xff\xfe", "not UTF-8")):
        file.write_bytes(content)
        outcome = cli("generate", *SMALL, "--prompts", file, "--output", tmp_path / "shot.gif")
        assert (outcome.status, message in outcome.err) == (2, True), outcome.err
    assert "cannot be read: No such file" in cli("generate", "--prompts", tmp_path / "none.txt").err
    assert "leave one of them out" in cli("generate", "--prompts", file, "--prompt", "x").err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_two_processes_one_of_which_is_killed(wan_folder, prompts, tmp_path):
    """The killed one's share is finished by the same command given again; nobody makes what is there."""
    asked = ["generate", "--model", wan_folder, *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif"]

    def start():
        launched = []
        for rank in range(2):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            launched.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dit_accel", *map(str, asked)],
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return launched

    first, second = start()
    while not (tmp_path / "shot-0000.json").exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    _, error = first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL, error
    printed, error = second.communicate(timeout=120)
    assert second.returncode == 0, error
    assert "2 of 5 prompts to do, process 1 of 2" in printed
    done = {path.stem for path in tmp_path.glob("shot-*.json")}
    assert {"shot-0000", "shot-0001", "shot-0003"} <= done < {f"shot-{i:04d}" for i in range(5)}
    before = outputs(tmp_path)
    assert [entry["done"] for entry in manifest(tmp_path)] == [f"shot-{i:04d}" in done for i in range(5)]

    for process in start():
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    after = outputs(tmp_path)
    assert {name: after[name] for name in before if name.removesuffix(".gif") in done} == {
        name: before[name] for name in before if name.removesuffix(".gif") in done
    }
    assert len(after) == 5 and all(entry["done"] for entry in manifest(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_where_a_process_stands(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.here() == Process(0, 1, None)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Process.here() == Process(3, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DitAccelError, match="RANK counts from 0"):
        Process.here()
    monkeypatch.delenv("RANK")
    with pytest.raises(DitAccelError, match="unset them or all three"):
        Process.here()
