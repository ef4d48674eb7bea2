"""How a command ends: interrupted, terminated, on a terminal or a disk that takes no more, or by a defect of ours."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
from messages import says

import dit_accel

SIZE = ("--frames", "5", "--height", "32", "--width", "48", "--steps", "1")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def ending(errors):
    """The last line of stderr, which is the command's own and no error, and no traceback is above it."""
    line = errors.splitlines()[-1]
    assert line.startswith("dit-accel: ") and not line.startswith("dit-accel: error: "), errors
    assert "Traceback" not in errors
    return line


def test_ctrl_c(cli, demo, tmp_path, monkeypatch):
    from dit_accel.generation import sampling

    monkeypatch.setattr(sampling, "call", interrupted)
    outcome = cli("generate", *SIZE, "--method", "gna:window=0.5", "--output", tmp_path / "a.mp4")
    assert outcome.status == 130 and ending(outcome.err)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_verb_that_has_nothing_to_say(cli, monkeypatch):
    from dit_accel.setting import Setting

    monkeypatch.setattr(Setting, "plan", interrupted)
    outcome = cli("plan", "--method", "radial", "--grid", "4x4x4")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", f"{ending(outcome.err)}\n")


def test_ctrl_c_while_the_model_of_a_batch_is_loaded(cli, demo, tmp_path, monkeypatch):
    from dit_accel.generation import sources

    monkeypatch.setattr(sources, "load", interrupted)
    outcome = cli("generate", *SIZE, "--prompts", "demo", "--output", tmp_path / "a.mp4")
    assert outcome.status == 130
    assert says(ending(outcome.err), 0, 16)


@pytest.mark.parametrize(
    ("command", "shown"),
    [(("ls",), [*dit_accel.list_methods(), *dit_accel.list_families()]), (("ls", "gna"), ["arXiv:2504.16922"])],
    ids=["ls", "ls gna"],
)
def test_a_terminal_without_the_characters_still_shows_the_rest(root, command, shown):
    """Method summaries and error messages have characters that ASCII has not."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "dit_accel", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert says(done.stdout, *shown)


def test_a_process_prints_one_line_too(root, tmp_path):
    """Nothing that a fresh process prints on its own, such as a warning of a library, comes with the error."""
    command = [sys.executable, "-m", "dit_accel", "generate", "--method", "gna:window=99", "--model", "nobody/nothing"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not pathlib.Path(root / "output.mp4").exists()


def test_a_defect_of_ours_is_not_hidden(cli, demo, monkeypatch):
    """Only what was foreseen becomes one line; anything else keeps its traceback."""
    from dit_accel.cli import job

    def broken(request):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(job, "prepare", broken)
    with pytest.raises(ZeroDivisionError):
        cli("generate")


@pytest.mark.parametrize("verb", [("ls",), ("env",), ("plan", "--method", "radial", "--grid", "4x4x4", "--json")])
def test_a_full_standard_output_is_one_line(root, verb):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dit_accel", *verb]
        done = subprocess.run(command, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("dit-accel: error: ") and says(line, os.strerror(errno.ENOSPC))


def test_sigterm_is_one_line(root, demo_folder, tmp_path):
    """The signal comes in the middle of the denoising loop."""
    program = (
        "import os, signal, sys; from dit_accel.cli.app import main; from dit_accel.generation import sampling; "
        "sampling.call = lambda *_: os.kill(os.getpid(), signal.SIGTERM); main(sys.argv[1:])"
    )
    options = ("generate", "--model", demo_folder, *SIZE, "--output", tmp_path / "a.mp4")
    command = [sys.executable, "-c", program, *map(str, options)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert ending(done.stderr)
    assert list(tmp_path.iterdir()) == []
