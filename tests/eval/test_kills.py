"""A sweep that is killed again and again ends with the results of one that was not."""

import json
import multiprocessing
import random
import time

import pytest

from dit_accel.eval import quality
from dit_accel.eval.suite import methods

KILLS = 20
SWEEP = {"frames": 9, "height": 32, "width": 32, "steps": 2, "seeds": tuple(range(4)), "metrics": ("psnr", "ssim")}
METHODS = ("gna:window=0.5", "tile:references=1", "sla:topk=0.3,block=16")
TIMES = {"seconds", "denoising_seconds", "seconds_per_step", "attention_seconds", "date"}


def sweep(model, prompts, output) -> None:
    """The evaluation, in a process that the test kills."""
    chosen = tuple(methods(METHODS))
    quality.run(quality.Request(output=output, model=str(model), prompts=str(prompts), methods=chosen, **SWEEP))


def lines(output) -> int:
    """Whole lines of results."""
    path = output / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def figures(output):
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    kept = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return kept, [(row["label"], row["density"], row["figures"]) for row in summary["rows"]]


@pytest.fixture(scope="module")
def starter():
    """Starts processes that are forked from one which has imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "torchmetrics", "accelerate", "dit_accel.eval.summary"])
    return context


def test_kills_lose_nothing(starter, wan_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")

    def start(output):
        process = starter.Process(target=sweep, args=(wan_folder, prompts, output))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    expected = figures(tmp_path / "whole")
    assert len(expected[0]) == 2 * 4 * 4

    chance, output, kills, before = random.Random(0), tmp_path / "killed", 0, 0
    while kills < KILLS:
        process, begun = start(output), lines(output)
        while process.is_alive() and lines(output) == begun and lines(output) < len(expected[0]) - 2:
            time.sleep(0.01)  # until it works: most of a process's life is loading
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        assert lines(output) >= before, "a finished sample was lost"
        before = lines(output)
        assert before < len(expected[0]), "the sweep is too short for that many kills"
    last = start(output)
    last.join()
    assert last.exitcode == 0
    assert figures(output) == expected
    assert not list(output.rglob("*.tmp"))
