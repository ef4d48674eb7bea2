"""Predicted times: the schedule and the steps by hand, and the measured rows that the model came from."""

import json
from pathlib import Path

import pytest

import dit_accel
from dit_accel.bench.rows import Target, get_shape
from tools.kernels import predict

ROWS = Path(__file__).parents[3] / "benchmarks" / "results" / "h200" / "rows.jsonl"


def test_programs_go_to_the_first_free_multiprocessor():
    assert predict.makespan([5, 1, 1, 1, 4], processors=2) == 7  # 5 beside 1, 1, 1, then 4 behind these
    assert predict.makespan([1] * 7, processors=3) == 3


def test_steps_of_a_plan_by_hand():
    """Two frames of 128 tokens, each attended by itself, and 70 text tokens: two blocks of 64 keys a step."""
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(2, 8, 16, text=70), window=(1, "full", "full"))
    text, visual = predict.steps_of(plan)
    assert text == [predict.Item(steps=3, masked=1)]  # 4 whole visual blocks, then the text
    assert visual == [predict.Item(steps=2, masked=1)] * 2


@pytest.mark.parametrize(
    ("method", "shape"), [("gna", "hunyuan-768p"), ("tile", "hunyuan-768p"), ("gna", "wan-14b-720p")]
)
def test_rows_of_whole_blocks_are_as_measured(method, shape):
    target, rows = Target(method, 0.1), [json.loads(line) for line in ROWS.read_text().splitlines()]
    measured = predict.measured(rows, get_shape(shape), target)
    assert predict.predict(get_shape(shape), target, predict.PROGRAM).total == pytest.approx(measured, rel=0.03)


def test_a_routed_call_has_all_its_parts():
    parts = predict.predict(get_shape("hunyuan-720p"), Target("sol", 0.16))
    assert None not in parts and parts.total == sum(parts)
    assert predict.predict(get_shape("wan-14b-720p"), Target("sparge", 0.16)).tail is None


def test_the_table_has_measured_rows_beside_predicted_ones(capsys):
    lines = list(predict.table([{"row": "flux-2k/gna/0.1/bfloat16/forward", "ms_p50": 0.9}], ["flux-2k"]))
    assert lines[0].endswith("measured |") and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| `gna` flux-2k") and lines[2].endswith("| 0.9 |")


@pytest.mark.parametrize(("options", "start"), [([], predict.START), (["--start", "8"], predict.PROGRAM)])
def test_the_command_takes_what_an_item_takes_beside_its_steps(capsys, monkeypatch, options, start):
    monkeypatch.setattr("sys.argv", ["predict", "--shape", "flux-2k", *options])
    predict.main()
    assert capsys.readouterr().out.splitlines() == list(predict.table([], ["flux-2k"], start))
