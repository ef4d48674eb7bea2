"""One field of a dataclass is one option of the command line, one key of a file, one entry of a record."""

import dataclasses
import typing
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from dit_accel import values
from dit_accel.cli.app import app
from dit_accel.cli.options import command
from dit_accel.values import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    PANEL: ClassVar[str] = "How large"

    frames: int | None = option(None, "Frames of it.", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Size):
    seeds: tuple[int, ...] = option(
        (0, 1), "Seeds.", metavar="N,N", parse=lambda text: tuple(map(int, text.split(",")))
    )
    pairs: tuple[str, ...] = option((), "Pairs.", flag="--pair", metavar="KEY=VALUE", repeatable=True)
    place: Path | None = option(None, "A place.")
    kind: Literal["a", "b"] = option("a", "A kind.")
    fast: bool = option(False, "Faster.")
    hidden: int = option(3, "In files alone.", typed=False)


@pytest.fixture
def run():
    """Runs a verb with these options; gives what it was called with, or what it printed."""
    seen = []
    program = typer.Typer()

    @program.command()
    @command(Request)
    def verb(typed):
        """A verb."""
        seen.append(typed)

    def invoke(*arguments):
        outcome = CliRunner().invoke(program, [str(argument) for argument in arguments])
        return seen.pop() if seen else outcome.output

    return invoke


def test_a_verb_gets_what_was_typed_and_nothing_else(run):
    assert run() == {}
    typed = run("--seeds", "3,4", "--pair", "a=1", "--pair", "b=2", "--place", "x", "--fast", "--frames", 2)
    assert typed == {"seeds": (3, 4), "pairs": ("a=1", "b=2"), "place": Path("x"), "fast": True, "frames": 2}
    assert Request(**typed) == Request(seeds=(3, 4), pairs=("a=1", "b=2"), place=Path("x"), fast=True, frames=2)
    assert run("--kind", "a") == {"kind": "a"}  # typed, though it is the default


def test_limits_and_choices_are_the_fields(run):
    assert "'--frames'" in run("--frames", 0)
    assert "'--kind'" in run("--kind", "c")
    assert "--hidden" in run("--hidden", 4)


def test_help_shows_the_fields(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = run("--help")
    for text in ("How large", "Frames of it.", "--pair", "KEY=VALUE", "[default: 0,1]", "[default: a]"):
        assert text in out
    assert "hidden" not in out


def verbs():
    for verb in app.registered_commands:
        groups = {group for cell in verb.callback.__closure__ for group in [cell.cell_contents] if is_groups(group)}
        yield from ((verb.callback.__name__, group) for groups in groups for group in groups)


def is_groups(value):
    return isinstance(value, tuple) and value and all(dataclasses.is_dataclass(group) for group in value)


def test_every_verb_takes_its_options_from_dataclasses_that_explain_them():
    groups = list(verbs())
    wanted = {"generate", "evaluate", "train", "bench", "plan", "ls", "doctor", "env", "tune", "serve"}
    assert {name for name, _ in groups} == wanted
    for _, group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            assert field.name in hints
            if "option" in field.metadata:
                assert field.metadata["option"].help.endswith("."), field.name
                assert values.flag(field).startswith("--")
