"""What README and CONTRIBUTING tell people to type exists and is accepted."""

import ast
import pathlib
import re
import shlex

import pytest
import typer

from dit_accel.cli.app import app

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("dit-accel ")]


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    """Options and their values are accepted, the method with its settings too; nothing is run."""
    from dit_accel import registry

    _, verb, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    context = group.commands[verb].make_context(verb, arguments, resilient_parsing=False)
    methods = context.params.get("method") or ()
    for method in [methods] if isinstance(methods, str) else methods:
        name, settings = registry.parse_method(method, context.params.get("settings") or ())
        registry.make_config(name, settings)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_parses_and_its_names_exist(block):
    import dit_accel

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit_accel":
            assert hasattr(dit_accel, node.attr)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(text):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert (
        set(re.findall(r"\bmake ([a-z]+)", "\n".join([*blocks(text, "sh"), *re.findall(r"`[^`\n]+`", text)])))
        <= targets
    )


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_method_is_listed():
    import dit_accel

    for name in dit_accel.list_methods():
        assert f"| `{name}` |" in README


def test_every_family_is_named():
    from dit_accel.registry import get_families

    names = {name: re.split("[:;,(]", family.summary)[0].strip() for name, family in get_families().items()}
    words = " ".join(README.split())
    assert {name for name, first in names.items() if first not in words} == set()


@pytest.mark.parametrize(
    ("starts", "file"),
    [("def layout", "dit_accel/pipelines/allegro.py"), ("GRID = ", "tests/pipelines/models/allegro.py")],
)
def test_the_family_shown_is_the_one_there_is(starts, file):
    """The example of CONTRIBUTING is what the files of that family say, to their ends."""
    shown = next(block for block in blocks(CONTRIBUTING, "python") if block.startswith(starts))
    assert (ROOT / file).read_text(encoding="utf-8").strip().endswith(shown.strip())
