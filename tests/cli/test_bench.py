"""`dit-accel bench`."""

import json
from pathlib import Path

import pytest
import torch
from messages import says

from dit_accel.bench import results
from dit_accel.bench import rows as bench_rows
from dit_accel.bench.rows import Shape, Target

TINY = Shape(
    "cpu",
    (3, 6, 8),
    heads=2,
    head_dim=16,
    targets=(Target.of("gna", window=3), Target("tile", 0.9)),
    dtypes=("float32",),
    directions=("forward",),
    devices=("cpu",),
)
FAST = ("--device", "cpu", "--seconds", "0")


@pytest.fixture
def tiny(monkeypatch):
    """One shape, so small that all its rows take a moment."""
    monkeypatch.setattr(bench_rows, "get_shapes", lambda: {"cpu": TINY})


@pytest.fixture
def wrong(monkeypatch):
    """A kernel whose results are not exact."""
    from dit_accel.kernels.block_sparse import portable

    right = portable.forward

    def forward(*arguments):
        out, lse = right(*arguments)
        return out * 1.01, lse

    monkeypatch.setattr(portable, "forward", forward)


def test_table_of_cpu_rows_fits_80_columns(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (rows,) = Path("benchmarks/results").glob("cpu-amd-epyc.jsonl")
    lines = cli("bench", "--read", rows).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("=" in line and line.split()[-1].replace(".", "").isdigit() for line in lines) >= 16


def test_rows_and_table(cli, tiny, tmp_path):
    outcome = cli("bench", *FAST, "--output", tmp_path / "rows.jsonl")
    assert outcome.status == 0, outcome.err
    rows = results.read(tmp_path / "rows.jsonl")
    assert [row["op"] for row in rows] == ["gna", "tile"]
    assert says(outcome.out, *(f"{row['speedup']:.2f}" for row in rows))
    first, second = outcome.err.splitlines()
    assert says(first, "1/2", f"{rows[0]['row']}:", "ms") and says(second, "2/2", f"{rows[1]['row']}:", "ms")


def test_json_is_what_the_file_holds(cli, tiny, tmp_path):
    outcome = cli("bench", *FAST, "--json", "--rows", "*/gna*", "--output", tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in outcome.out.splitlines()] == results.read(tmp_path / "rows.jsonl")


def test_a_second_run_adds_its_rows(cli, tiny, tmp_path):
    output = tmp_path / "rows.jsonl"
    for _ in range(2):
        assert cli("bench", *FAST, "--method", "gna", "--output", output).status == 0
    output.write_bytes(output.read_bytes()[:-9])  # as if the second had been cut short
    cli("bench", *FAST, "--method", "gna", "--output", output)
    assert len(results.read(output)) == 2


def test_options_make_rows_that_are_not_declared(cli, tiny):
    options = ("--method", "radial:decay=0.3", "--dtype", "bfloat16", "--direction", "both", "--impl", "portable")
    outcome = cli("bench", *FAST, *options, "--json")
    assert outcome.status == 0, outcome.err
    (row,) = map(json.loads, outcome.out.splitlines())
    assert (row["op"], row["dtype"], row["direction"]) == ("radial", "bfloat16", "both")
    assert row["config"]["decay"] == 0.3


def test_a_red_gate_prints_no_speed(cli, tiny, wrong, tmp_path):
    outcome = cli("bench", *FAST, "--output", tmp_path / "rows.jsonl")
    assert outcome.status == 1
    assert outcome.out == ""
    assert says(outcome.err, "red: out:") and " ms" not in outcome.err
    assert not (tmp_path / "rows.jsonl").exists()


def test_out_of_reach_is_no_failure(cli, tiny):
    outcome = cli("bench", *FAST, "--method", "tile", "--density", "0.05", "--density", "0.9")
    assert outcome.status == 0
    assert says(outcome.err, "reach tile 3x6x8")


def test_what_is_refused_beside_measured_rows_fails_the_run(cli, tiny):
    outcome = cli("bench", *FAST, "--method", "gna:window=4", "--method", "gna:window=3")
    assert outcome.status == 1
    assert says(outcome.err, "window 4")
    assert "window=3" in outcome.out and "window=4" not in outcome.out


def test_an_interrupted_run_keeps_its_rows(cli, tiny, tmp_path, monkeypatch):
    from dit_accel.bench.run import Bench

    def interrupted(bench, rows):
        yield next(right(bench, rows))
        raise KeyboardInterrupt

    right = Bench.run
    monkeypatch.setattr(Bench, "run", interrupted)
    outcome = cli("bench", *FAST, "--output", tmp_path / "rows.jsonl")
    assert outcome.status == 130
    assert says(outcome.err, "1 2")
    assert len(results.read(tmp_path / "rows.jsonl")) == 1


def test_resume_measures_what_is_missing(cli, tiny, tmp_path):
    output = tmp_path / "rows.jsonl"
    run = ("bench", *FAST, "--resume", "--output", output)
    cli(*run, "--method", "tile")
    assert cli(*run).err.startswith("1/1 cpu/gna:window=3/-/float32/forward: ")
    assert len(results.read(output)) == 2
    assert says(cli(*run).err, "rows.jsonl")
    assert "2/2" in cli(*run, "--impl", "reference").err
    assert says(cli(*run, "--impl", "reference").err, "rows.jsonl")
    other = output.read_text().replace('"git": "', '"git": "other ')
    output.write_text(other)
    assert "2/2" in cli(*run).err


def test_list(cli):
    names = cli("bench", "--list").out.split()
    assert names == [row.name for row in bench_rows.select()]
    rows = [json.loads(line) for line in cli("bench", "--list", "--json", "--shape", "mochi").out.splitlines()]
    assert {row["shape"] for row in rows} == {"mochi"}
    assert {row["tokens"] for row in rows} == {28 * 30 * 53 + 256}


def test_picture_and_table_of_a_file(cli, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    assert cli("bench", *FAST, "--output", output, "--picture", picture).status == 0
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    outcome = cli("bench", "--read", output, "--picture", picture)
    assert outcome.status == 0
    assert "tile" in outcome.out
    assert picture.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "moshi"), "shape 'moshi' 'mochi'"),
        (("--method", "gnaa"), "method 'gnaa' 'gna'"),
        (("--method", "gna:windw=3"), "gna 'windw' 'window'"),
        (("--method", "gna:window=99"), "cpu/gna:window=99/-/float32/forward gna's window"),
        (("--density", "0"), "density 0"),
        (("--density", "5%"), "--density"),
        (("--dtype", "int8"), "dtype float32 bfloat16 float16 'int8'"),
        (("--direction", "sideways"), "direction forward 'sideways'"),
        (("--rows", "none/*"), "'none/*'"),
        (("--rows", ""), "''"),
        (("--impl", "fast"), "impl auto"),
        (("--seconds", "-1"), "--seconds"),
        (("--seconds", "inf"), "--seconds"),
        (("--device", "toaster"), "--device toaster"),
        (("--output", "rows.txt"), "rows.txt .jsonl"),
        (("--picture", "rows.jpg"), "rows.jpg .png"),
        (("--read", "none.jsonl"), "none.jsonl No such file"),
        (("--read", "a.jsonl", "--list"), "--read"),
        (("--list", "--picture", "a.png"), "--list"),
        (("--resume",), "--output FILE.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(cli, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    outcome = cli("bench", *(() if {"--shape", "--read"} & set(options) else ("--shape", "cpu")), *FAST[2:], *options)
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    line = outcome.err.splitlines()[-1]
    assert line.startswith("dit-accel: error: ")
    assert says(line, message)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_not_added_to_a_file_of_something_else(cli, tiny, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"note": 1}\n')
    outcome = cli("bench", *FAST, "--output", tmp_path / "notes.jsonl")
    assert outcome.status == 2
    assert says(outcome.err, tmp_path / "notes.jsonl", "line 1,")
    assert (tmp_path / "notes.jsonl").read_text() == '{"note": 1}\n'


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs there")
def test_triton_runs_or_is_refused(cli, tiny):
    outcome = cli("bench", *FAST, "--impl", "triton")
    assert outcome.status == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith("dit-accel: error: ") and says(line, "cpu/gna:window=3/-/float32/forward", "CUDA")


def test_help(cli):
    outcome = cli("bench", "--help")
    assert outcome.status == 0
    assert "dit-accel bench" in outcome.out


def test_a_profile_of_each_row(cli, tiny, tmp_path):
    outcome = cli("bench", *FAST, "--profile", tmp_path / "profile.txt")
    assert outcome.status == 0, outcome.err
    text = (tmp_path / "profile.txt").read_text()
    assert "cpu/gna:window=3/-/float32/forward" in text and "cpu/tile" in text
    assert "dit_accel::block_sparse_attention" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", "--list"), "--list"),
        (("--read", "rows.jsonl", "--rows", "x", "--peer"), "--rows --peer"),
    ],
)
def test_options_that_do_not_go_together(cli, arguments, words):
    outcome = cli("bench", *arguments)
    assert outcome.status == 2
    assert says(outcome.err, words)


def test_a_file_without_rows_is_refused(cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    outcome = cli("bench", "--read", tmp_path / "rows.jsonl")
    assert (outcome.status, says(outcome.err, "rows")) == (2, True)
