"""What the command line prints fits a terminal of 80 columns, and is wrapped between words alone."""

import pytest

import dit_accel
from dit_accel.pipelines.refused import REFUSED

VERBS = ("generate", "eval", "tune", "train", "bench", "plan", "ls", "doctor", "env", "serve")
PLAN = ("plan", "--method", "gna:window=3x5x7", "--grid", "5x9x11", "--text", "13", "--gpu", "sm_90")


@pytest.fixture
def check(cli, monkeypatch):
    """Runs a command at 80 columns and at 1,000, where nothing is wrapped."""

    def run(*arguments):
        texts = {}
        for columns in (80, 1000):
            monkeypatch.setenv("COLUMNS", str(columns))
            texts[columns] = cli(*arguments).out
        lines = texts[80].splitlines()
        assert lines
        assert [line for line in lines if len(line) > 80 or "…" in line] == []
        assert [word for word in texts[80].split() if "─" not in word and word not in texts[1000].split()] == []

    return run


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(check, verb):
    check(*verb.split(), "--help")


@pytest.mark.parametrize("command", [("ls",), ("ls", "formats"), ("doctor", "--device", "cpu"), PLAN], ids=str)
def test_a_table(check, command):
    check(*command)


def test_all_about_one(check):
    for name in (*dit_accel.list_methods(), *dit_accel.list_families(), *list(REFUSED)[:3]):
        check("ls", name)
