"""The script of a GPU session: every command that it would run is one that the command line takes."""

import os
import shlex
import subprocess

import pytest

from tools.steps import measure

RECORD = """#!/bin/bash
if [ "$1" = -c ]; then exit 0; fi
printf '%q ' "$@" >> {log}
echo >> {log}
while [ $# -gt 0 ]; do
    if [ "$1" = --output ]; then echo '{{"op": 1}}' >> "$2"; fi
    shift
done
"""


PARTS = {"A": 525, "B": 525, "C": 465}  # seconds


@pytest.fixture(scope="module")
def session(root, tmp_path_factory):
    """What a part of the script gives to Python, which here only writes it down, and what the script says."""
    folder = tmp_path_factory.mktemp("h200")

    def run(*arguments, **variables):
        log, python = folder / "log", folder / "python"
        python.write_text(RECORD.format(log=log))
        python.chmod(0o755)
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", root / "benchmarks" / "h200.sh", *map(str, arguments)],
            env=os.environ | {"PYTHON": str(python), "DEVICE": "cpu"} | variables,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done, [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


@pytest.fixture(scope="module")
def parts(session, tmp_path_factory):
    """The commands of each part, in a dry run on a CPU."""
    commands = {}
    for part in PARTS:
        done, commands[part] = session(part, tmp_path_factory.mktemp(part) / "rows")
        assert done.returncode == 0, done.stdout + done.stderr
    return commands


@pytest.fixture(scope="module")
def commands(parts):
    return [command for commands in parts.values() for command in commands]


def test_every_step_is_declared(commands, monkeypatch, capsys):
    measured = [rest for _, module, *rest in commands if module == "tools.steps.measure" and "--read" not in rest]
    assert len(measured) == 8
    for arguments in measured:
        monkeypatch.setattr("sys.argv", ["measure", *arguments, "--list"])
        with pytest.raises(SystemExit) as stop:
            measure.main()
        assert stop.value.code == 0
        assert capsys.readouterr().out.strip()


def test_every_command_selects_rows(commands, cli):
    measured = [rest for _, package, *rest in commands if package == "dit_accel" and "--read" not in rest]
    assert len(measured) > 10
    for verb, *arguments in measured:
        outcome = cli(verb, *arguments, "--list")
        assert outcome.status == 0, outcome.err
        assert outcome.out.strip()


def test_each_part_measures_its_own(parts):
    said = {part: [" ".join(command) for command in commands] for part, commands in parts.items()}
    wanted = {
        "A": (
            *(
                "tests/kernels/tail",
                "tests/kernels/block_sparse/test_gluon_backward.py",
                "tests/kernels/sla/test_gluon.py",
            ),
            *("--direction both --impl auto", "--direction both --impl gluon"),
            "sla:topk=0.05,block_q=128 --direction forward --impl gluon",
            *("--method sol", "--method rectified --direction forward --seconds 0.1 --profile"),
            *("--shape anchor-110k", "--read"),
        ),
        "B": tuple(
            f"--rounds 1 --resume --output {{}} --shape {model} --mode {mode}"
            for model in ("wan-14b-720p", "hunyuan-720p", "flux-4k")
            for mode in ("eager", "compiled")
        ),
        "C": ("--direction backward --seconds 0.1 --profile", "pytest -q -n auto tests/kernels", "--peer", "--read"),
    }
    for part, fragments in wanted.items():
        for fragment in fragments:
            before, _, after = fragment.partition("{}")
            assert any(before in command and after in command for command in said[part]), (part, fragment)
    eager = [command for command in said["B"] if "tools.steps.measure" in command and "--mode" in command]
    assert "eager" in eager[0] and [" compiled" in command for command in eager].index(True) == 3


def test_rows_of_an_earlier_run_are_not_mixed_in(session, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    done, commands = session("A", tmp_path)
    assert done.returncode == 2 and "fresh folder" in done.stderr
    assert [command[0] for command in commands] in ([], ["-c"])
    assert session("A", tmp_path, RESUME="1")[0].returncode == 0
    done, commands = session("D")
    assert done.returncode == 2 and "A|B|C" in done.stderr and not commands


def test_the_time_of_a_part_bounds_its_commands(root):
    """Each command's limit is cut to what is left of the part's time."""
    script = (root / "benchmarks" / "h200.sh").read_text()
    for limit in set(PARTS.values()):
        assert f"LIMIT=${{LIMIT:-{limit}}}" in script
    assert "limit < left ? limit : left" in script
