"""The manual's commands for the embedded model run, its pages are short, and each has something to see or to type.

`tests/test_readme.py` parses all commands, `make docs` finds broken links. Here every command that names no other model
runs, once, with few steps of a small clip.
"""

import pathlib
import re

import pages
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}
MOST_WORDS = 1200
SMALL = {"frames": 9, "height": 64, "width": 64, "steps": 3}
SIZED = ("generate", "eval")
# Parsed by test_readme.py and not run here: these take minutes, or need what such a command makes.
NOT_RUN = {
    "dit-accel train ": "a training; tests/cli/test_train.py runs the verb",
    "dit-accel tune ": "a search or a calibration; tests/tune runs them",
    "dit-accel bench .*--(shape|rows)": "minutes; tests/cli/test_bench.py runs the verb",
    "dit-accel serve ": "serves until Ctrl-C; tests/cli/test_serve.py has the page",
    "--suite demo": "twelve steps of every method; tests/eval runs suites",
    "--load trained": "what a training writes; tests/cli/test_train.py loads one",
}


def runs(command: str) -> bool:
    _, *arguments = pages.words(command)
    others = (pages.value(arguments, option) not in (None, "demo") for option in ("--model", "--suite"))
    return not any(others) and not any(re.search(name, command) for name in NOT_RUN)


COMMANDS = list(dict.fromkeys(line for text in TEXTS.values() for line in pages.typed(text) if runs(line)))


def test_there_are_commands_that_run():
    assert {pages.words(command)[0] for command in COMMANDS} >= {"generate", "eval", "plan", "ls", "bench"}
    assert any("--load tuned/settings.json" in command for command in COMMANDS)
    assert all(any(re.search(name, line) for text in TEXTS.values() for line in pages.typed(text)) for name in NOT_RUN)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the pages have from commands that do not run here."""
    from dit_accel.caches.ratios import MagRatios
    from dit_accel.setting import Setting

    folder = tmp_path_factory.mktemp("manual")
    (folder / "prompts.txt").write_text("a red circle moves right on a blue background\n")
    (folder / "tuned").mkdir()
    (folder / "tuned" / "settings.json").write_text(Setting.parse("sol:block=16,block_q=16 dense_steps=1").to_json())
    MagRatios((0.98,)).save(folder / "tuned" / "mag_ratios.json")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command, cli, place, monkeypatch):
    monkeypatch.chdir(place)
    arguments = pages.words(command)
    if arguments[0] in SIZED:
        arguments = pages.small(arguments, **SMALL)
    if arguments[0] == "eval":
        arguments += ["--metric", "psnr"]  # the others measure with a network
    if "--prompts" in arguments:
        arguments += ["--prompts", "prompts.txt"]
    done = cli(*arguments)
    assert done.status == 0, done.err
    output = pages.value(arguments, "--output")
    if output and "--prompts" not in arguments:
        assert (place / output).is_file() and (place / output).with_suffix(".json").is_file()


def test_pages_are_short():
    words = {name: len(text.split()) for name, text in TEXTS.items()}
    assert {name: count for name, count in words.items() if count > MOST_WORDS} == {}


def test_every_page_shows_something_or_says_what_to_type():
    assert [name for name, text in TEXTS.items() if not re.search(r"!\[|^```(sh|python)", text, re.MULTILINE)] == []


def test_every_page_has_its_place_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"[\w/-]+\.md", navigation)
    assert len(named) == len(set(named))
    assert {name.removeprefix("docs/") for name in TEXTS} <= set(named)
