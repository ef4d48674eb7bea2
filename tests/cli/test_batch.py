"""`dit-accel generate --prompts`: shares, going on after a kill, the manifest."""

import json
import os
import signal
import subprocess
import sys

import kills
import pytest
from launching import TWO_PROCESSES
from messages import says

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
    assert (record["report"]["sparse_calls"], record["report"]["dense_calls"]) == (4, 0)


def test_again_makes_only_what_is_missing(cli, demo, prompts, tmp_path):
    asked = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*asked).status == 0
    before = outputs(tmp_path)
    (tmp_path / "shot-0001.json").unlink()
    (tmp_path / "shot-0002.json").unlink()
    (tmp_path / "shot-0002.gif").unlink()
    (tmp_path / "shot-0003.gif").write_bytes(b"")  # a file that a full disk cut off
    (tmp_path / ".dit-accel-shot-0002.gif.abc").mkdir()
    (tmp_path / "shot.jsonl").unlink()
    outcome = cli(*asked)
    assert "3 of 5 prompts to do" in outcome.out
    after = outputs(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    made_again = {name for name in before if before[name][0] != after[name][0]}
    assert made_again == {f"shot-000{i}.gif" for i in (1, 2, 3)}
    assert all(entry["done"] for entry in manifest(tmp_path))
    assert not list(tmp_path.glob(".dit-accel-*"))
    assert "0 of 5 prompts to do" in cli(*asked).out


def test_other_options_are_refused(cli, demo, prompts, tmp_path):
    asked = ("generate", *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif")
    assert cli(*asked).status == 0
    outcome = cli(*asked, "--seed", 3)
    assert outcome.status == 2
    assert says(outcome.err, "--seed 0 3")
    prompts.write_text("\n".join(reversed(PROMPTS)))
    assert says(cli(*asked).err, "--prompt")


def test_bad_prompts_are_refused(cli, demo, tmp_path):
    file = tmp_path / "prompts.txt"
    for content, message in ((b" \n\n", "holds no prompt."), (b"\xff\xfe", "cannot be read as text")):
        file.write_bytes(content)
        outcome = cli("generate", *SMALL, "--prompts", file, "--output", tmp_path / "shot.gif")
        assert (outcome.status, message in outcome.err) == (2, True), outcome.err
    assert "is no file, folder or built-in list" in cli("generate", "--prompts", tmp_path / "none.txt").err
    assert says(cli("generate", "--prompts", file, "--prompt", "x").err, "--prompt --prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_two_processes_one_of_which_is_killed(cli, wan_folder, prompts, tmp_path, root, monkeypatch):
    """Killed between an output and its record, then between a record and the manifest; each time the rest is made."""
    asked = ["generate", "--model", wan_folder, *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif"]
    place = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    path = {"PYTHONPATH": os.pathsep.join((str(root), kills.TESTS)), "OMP_NUM_THREADS": "1"}

    def start(rank, command):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**os.environ, **place[rank], **path}, **pipes)

    def names(*indices):
        return {f"shot-{i:04d}" for i in indices}

    first = start(0, kills.cli(tmp_path, "shot-0001.json", 2, asked))  # written, and not yet moved to its place
    second = start(1, [sys.executable, "-m", "dit_accel", *map(str, asked)])
    _, error = first.communicate()
    assert first.returncode == -signal.SIGKILL, error
    printed, error = second.communicate()
    assert second.returncode == 0, error
    assert "3 of 5 prompts to do, process 1 of 2" in printed
    assert {path.stem for path in tmp_path.glob("shot-*.gif")} == names(0, 1, 2, 3, 4)
    assert {path.stem for path in tmp_path.glob("shot-*.json")} == names(0, 2, 3, 4)
    assert [entry["done"] for entry in manifest(tmp_path)] == [True, False, True, True, True]
    before = outputs(tmp_path)

    first = start(
        0, kills.cli(tmp_path, "shot.jsonl", 4, asked)
    )  # each is written and moved: at the start, and after the output
    printed, error = first.communicate()
    assert first.returncode == -signal.SIGKILL, error
    assert "1 of 5 prompts to do, process 0 of 2" in printed
    assert [entry["done"] for entry in manifest(tmp_path)] == [True, False, True, True, True]

    for name, value in place[0].items():
        monkeypatch.setenv(name, value)
    assert "0 of 5 prompts to do, process 0 of 2" in cli(*asked).out
    assert all(entry["done"] for entry in manifest(tmp_path))
    made_again = {name for name, made in outputs(tmp_path).items() if made != before[name]}
    assert made_again == {"shot-0001.gif"}
    assert not list(tmp_path.glob(".*"))


def test_accelerate_launch_shares_the_prompts(wan_folder, prompts, tmp_path, root):
    asked = ["generate", "--model", wan_folder, *SMALL, "--prompts", prompts, "--output", tmp_path / "shot.gif"]
    own = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, "-m", "dit_accel", *map(str, asked)],
        check=False,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"prompts to do, process {rank} of 2" in done.stdout
    assert [(entry["prompt"], entry["done"]) for entry in manifest(tmp_path)] == [(prompt, True) for prompt in ASKED]
    assert len(outputs(tmp_path)) == len(ASKED)
