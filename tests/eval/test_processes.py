"""The same command on two processes gives the same figures as on one."""

import contextlib
import json

import launching
import numpy as np
import pytest

from dit_accel.generation import output

TIMES = {"seconds", "denoising_seconds", "seconds_per_step", "attention_seconds", "date"}


@pytest.fixture
def arguments(wan_folder, clip_folder, tmp_path):
    """An evaluation of three samples against a real set of three clips: not as many for each of two processes."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na white triangle\n")
    (tmp_path / "set").mkdir()
    source = np.random.default_rng(0)
    for name in "abc":
        output.write_frames(tmp_path / "set" / f"{name}.gif", source.integers(0, 256, (9, 32, 32, 3), np.uint8), fps=8)
    options = ["eval", "--model", wan_folder, "--prompts", tmp_path / "prompts.txt"]
    options += ["--frames", 9, "--height", 32, "--width", 32, "--steps", 1]
    options += ["--method", "gna:window=0.5", "--real", tmp_path / "set"]
    for name in ("psnr", "ssim", *(f"{name}[{clip_folder}]" for name in ("fid", "kid", "clip_score"))):
        options += ["--metric", name]
    return [str(option) for option in options]


def evaluate(arguments, rank, port, printed):
    """`dit-accel` as one of two processes, which prints into a file."""
    from dit_accel.cli.app import main

    launching.take_place(rank, 2, port)
    with printed.open("w") as stream, contextlib.redirect_stdout(stream):
        main(arguments)


def test_two_gloo_processes(starter, cli, arguments, tmp_path):
    alone, together = tmp_path / "one", tmp_path / "two"
    outcome = cli(*arguments, "--output", alone)
    assert outcome.status == 0, outcome.err
    port, printed = launching.free_port(), [tmp_path / f"{rank}.txt" for rank in range(2)]
    processes = [
        starter.Process(target=evaluate, args=([*arguments, "--output", str(together)], rank, port, printed[rank]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(path.read_text().count("report:") for path in printed) == 1
    rows, summaries = [], []
    for folder in (alone, together):
        lines = (folder / "results.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines])
        summaries.append(json.loads((folder / "summary.json").read_text()))
    assert rows[0] == rows[1]
    assert [summary["made"]["processes"] for summary in summaries] == [1, 2]
    assert sorted(path.name for path in together.glob("results*")) == ["results.jsonl"]
    for alone_row, row in zip(summaries[0]["rows"], summaries[1]["rows"], strict=True):
        for name, figure in alone_row["figures"].items():
            got, expected = row["figures"][name]["value"], figure["value"]
            if name.startswith("fid"):  # sums over samples in float64, in another order
                assert got == pytest.approx(expected, rel=1e-6)
            else:
                assert got == expected, name
