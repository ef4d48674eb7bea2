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


@pytest.fixture(scope="module")
def commands(root, tmp_path_factory):
    """What the script gives to Python, which here only writes it down."""
    folder = tmp_path_factory.mktemp("h200")
    log, python = folder / "log", folder / "python"
    python.write_text(RECORD.format(log=log))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(
        ["bash", root / "benchmarks" / "h200.sh", folder / "rows"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


def test_every_step_is_declared(commands, monkeypatch, capsys):
    measured = [rest for _, module, *rest in commands if module == "tools.steps.measure" and "--read" not in rest]
    assert len(measured) > 10
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


def test_it_tests_measures_and_sums_up(commands):
    said = [" ".join(command) for command in commands]
    for part in (
        "pytest -q -n auto tests/kernels",
        "tools.steps.measure",
        "--profile",
        "--direction both",
        "--read",
    ):
        assert any(part in command for command in said), part
    for model in ("wan-1.3b-480p", "wan-14b-480p", "wan-14b-720p", "hunyuan-720p", "flux-4k", "cogvideox"):
        for mode in ("eager", "compiled"):
            assert any(f"--shape {model} --mode {mode}" in command for command in said), (model, mode)
