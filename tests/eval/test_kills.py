"""A sweep that is killed again and again ends with the results of one that was not."""

import json
import random
import signal

import kills

from dit_accel.eval import quality
from dit_accel.eval.request import EvalRequest
from dit_accel.eval.suite import methods

KILLS = 9
SWEEP = {"frames": 9, "height": 32, "width": 32, "steps": 2, "seeds": tuple(range(4)), "metrics": ("psnr", "ssim")}
METHODS = ("gna:window=0.5", "tile:references=1", "sla:topk=0.3,block=8")
TIMES = {"seconds", "denoising_seconds", "seconds_per_step", "attention_seconds", "date"}


def sweep(model, prompts, output, *moment) -> None:
    """The evaluation, in a process that dies at that moment."""
    if moment:
        kills.die_before(output, *moment)
    chosen = tuple(methods(METHODS)[0])
    quality.run(EvalRequest(output=output, model=str(model), prompts=str(prompts), methods=chosen, **SWEEP))


def lines(output) -> int:
    """Whole lines of results."""
    path = output / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def figures(output):
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    scores = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return scores, [(row["label"], row["density"], row["figures"]) for row in summary["rows"]]


def test_kills_lose_nothing(starter, wan_folder, tmp_path):
    """Every sample is three writes besides locks: its frames, their rename, its line. The report comes last."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")

    def run(output, *moment):
        process = starter.Process(target=sweep, args=(wan_folder, prompts, output, *moment))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    expected = figures(tmp_path / "whole")
    assert len(expected[0]) == 2 * 4 * 4

    chance, output, done = random.Random(0), tmp_path / "killed", [0]
    moments = [(1, "results.jsonl")]  # the frames of the first baseline are there, their line is not
    moments += [(chance.randint(3, 27), "[!.]*") for _ in range(KILLS - 1)]
    for moment in moments:
        assert run(output, *moment) == -signal.SIGKILL
        done.append(lines(output))
    assert done == sorted(done), "a finished sample was lost"
    assert done[KILLS // 2] < done[-1] == len(expected[0]), "all kills came before the report, or all after the samples"
    assert run(output) == 0
    assert figures(output) == expected
    assert not [path for pattern in ("*.tmp", ".*") for path in output.rglob(pattern)]
