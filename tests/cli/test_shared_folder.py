"""Four processes over a shared folder: one is killed, one may only read it, two start late; all work is done once."""

import collections
import json
import signal

import kills
import launching
import pytest

PROMPTS = ["a red square", "a blue circle", "a green triangle", "a white star", "a yellow square", "a red circle"]
SMALL = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 1, "--method", "gna:window=0.5")
KILLED, READER, LATE = 0, 1, (2, 3)


def command(arguments, rank, port, folder, killed, reads):
    """`dit-accel` as one of four processes, in a process of its own."""
    from dit_accel.cli.app import main

    launching.take_place(rank, 4, port)
    if killed:
        kills.die_before(folder, *killed)
    if reads:
        kills.forbid_writes(folder)
    main([str(argument) for argument in arguments])


@pytest.fixture
def start(starter):
    """Starts a rank; it is killed before a write below the folder, or may only read it, if asked."""
    port, started = launching.free_port(), []

    def run(rank, arguments, folder, killed=(), reads=False):
        process = starter.Process(target=command, args=(arguments, rank, port, folder, killed, reads))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def statuses(*processes):
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def contents(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".gif", ".safetensors")}


def test_generate(start, wan_folder, prompts, tmp_path):
    """The killed process has written an output and not yet moved its record into place."""
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = ["generate", "--model", wan_folder, *SMALL, "--prompts", prompts, "--output", folder / "shot.gif"]
    assert statuses(start(KILLED, arguments, folder, (2, "shot-0000.json"))) == [-signal.SIGKILL]
    (whole,) = contents(folder)
    first = start(READER, arguments, folder, reads=True), start(LATE[0], arguments, folder)
    assert statuses(*first, start(LATE[1], arguments, folder)) == [2, 0, 0]
    names = [f"shot-{index:04d}" for index in range(len(PROMPTS))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["shot.jsonl", *(f"{name}.{ending}" for name in names for ending in ("gif", "json"))]
    )
    listed = [json.loads(line) for line in (folder / "shot.jsonl").read_text().splitlines()]
    assert [(entry["prompt"], entry["done"]) for entry in listed] == [(prompt, True) for prompt in PROMPTS]
    before = contents(folder)
    assert whole in before and statuses(start(KILLED, arguments, folder)) == [0] and contents(folder) == before


def test_eval(start, cli, wan_folder, prompts, tmp_path):
    """The others make what the killed process leaves, then stop; started again, they make nothing but the report."""
    arguments = ["eval", "--model", wan_folder, *SMALL, "--prompts", prompts, "--metric", "psnr", "--output"]
    outcome = cli(*arguments, tmp_path / "alone")
    assert outcome.status == 0, outcome.err
    folder, ranks = tmp_path / "shared", (1, READER + 1, 3, 0)
    killed, reader = ranks[:2]

    def together(*moment):
        shared = [*arguments, folder]
        return statuses(
            *(start(rank, shared, folder, moment if rank == killed else (), rank == reader) for rank in ranks)
        )

    assert together(1, f"results-{killed}.jsonl") == [-signal.SIGKILL, 2, 2, 2]
    rows = [json.loads(line) for path in folder.glob("results*.jsonl") for line in path.read_text().splitlines()]
    assert set(collections.Counter(row["key"] for row in rows).values()) == {1}
    before = contents(folder)
    assert len(rows) == len(before) == 2 * len(PROMPTS)
    assert together() == [0, 0, 0, 0]
    assert contents(folder) == before
    figures = []
    for place in (tmp_path / "alone", folder):
        lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
        table = json.loads((place / "summary.json").read_text())["rows"]
        figures.append(
            ([(row["key"], row["sha256"], row["scores"]) for row in lines], [row["figures"] for row in table])
        )
    assert figures[0] == figures[1]
    assert not list(folder.rglob(".*")) and not list(folder.glob("results-*"))
