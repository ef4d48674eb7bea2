"""A quiet terminal: nothing of other libraries that the user can do nothing about."""

import logging
import os
import subprocess
import sys
import warnings

from dit_accel.errors import DitAccelWarning
from dit_accel.generation.sampling import progress_bar
from dit_accel.pipelines.quiet import quiet_libraries

LIBRARIES = ("torchao", "pytree", "transformers", "diffusers", "rms_norm", "Loading", "Warning", "deprecat")


def test_generate_prints_its_own_lines_alone(tmp_path):
    """A process of its own, in which every library is imported for the first time."""
    size = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
    command = [
        "generate",
        *size,
        "--method",
        "sla:topk=0.3,block=16",
        "--compare",
        "--output",
        str(tmp_path / "clip.mp4"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-m", "dit_accel", *command], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for line in [*done.stdout.splitlines(), *done.stderr.splitlines()]:
        assert not [name for name in LIBRARIES if name in line], line
    # What is left on stderr are the progress bars.
    assert all("2/2" in line or not line.strip() for line in done.stderr.splitlines()), done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_errors_and_our_own_warnings_show(caplog):
    before = logging.getLogger("diffusers").level
    with quiet_libraries():
        logging.getLogger("torchao").warning("a missing kernel")
        logging.getLogger("torchao").error("a failure")
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
            warnings.warn("layers are dense", DitAccelWarning, stacklevel=1)
    assert [record.message for record in caplog.records] == ["a failure"]
    assert [str(warning.message) for warning in seen] == ["layers are dense"]
    assert logging.getLogger("diffusers").level == before and "DIFFUSERS_VERBOSITY" not in os.environ


def test_what_the_user_asked_for_wins(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    logging.getLogger("transformers").setLevel(logging.INFO)
    with quiet_libraries():
        assert logging.getLogger("transformers").level == logging.INFO
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_a_progress_bar_keeps_its_times_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar() as bar:
        bar.add_task(
            "17/128 gna:window=3xfullxfull,stride=1 dense_steps=4 dense_backend=auto", total=1000, completed=1000
        )
        bar.add_task("all samples", total=1000, completed=999)
    long, short = capsys.readouterr().err.splitlines()[-2:]
    assert "17/128 gna" in long and "…" in long
    for line in (long, short):
        assert len(line.rstrip()) <= 80
        assert line.count(":") >= 4 and "/1000" in line, line  # elapsed and remaining


def test_the_embedded_model_loads_without_a_word():
    """In Python as on the command line, in a process that has imported nothing yet."""
    program = "from dit_accel.pipelines.demo import load_demo; load_demo()"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
