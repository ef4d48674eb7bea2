"""The references as Markdown pages: the command line from typer's options, Python from `dit_accel.__all__`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

import dit_accel


def navigation() -> list[dict[str, list[dict[str, str]]]]:
    """Both references as entries of MkDocs' navigation."""
    verbs = [{"Overview": "cli/index.md"}, *({verb: f"cli/{verb}.md"} for verb in _verbs())]
    names = [{"Overview": "python/index.md"}, *({name: f"python/{name}.md"} for name in dit_accel.__all__)]
    return [{"CLI reference": verbs}, {"Python reference": names}]


def pages() -> dict[str, str]:
    """Name and Markdown of every generated page."""
    return _cli_pages() | _python_pages()


def _verbs() -> dict[str, Any]:
    from dit_accel.cli.app import app

    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _cli_pages() -> dict[str, str]:
    verbs = _verbs()
    lines = [
        "# Command line",
        "",
        "These pages are made from the options themselves. `dit-accel VERB --help` prints the same.",
        "",
        "```sh",
        "dit-accel --version",
        "dit-accel generate --help",
        "```",
        "",
        "| verb | what it does |",
        "|---|---|",
        *(f"| [`{name}`]({name}.md) | {_sentence(verb)} |" for name, verb in verbs.items()),
        "",
        "The exit status is 0 for success, 2 after bad input, 130 after Ctrl-C and 143 after SIGTERM.",
    ]
    return {"cli/index.md": "\n".join(lines)} | {f"cli/{name}.md": _verb(name, verb) for name, verb in verbs.items()}


def _sentence(verb: Any) -> str:
    return " ".join(verb.help.partition("\n\n")[0].split())


def _verb(name: str, verb: Any) -> str:
    """One verb: what it says of itself, its example as a block, and a table for each group of options."""
    lines = [f"# dit-accel {name}", ""]
    for paragraph in verb.help.split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("Example: "):
            lines += ["```sh", text.removeprefix("Example: "), "```", ""]
        else:
            lines += [text, ""]
    groups: dict[str, list[Any]] = {}
    for option in verb.params:
        if not option.hidden and option.name != "help":
            groups.setdefault(option.rich_help_panel or "Options", []).append(option)
    context = verb.make_context(name, [], resilient_parsing=True)
    for title, options in groups.items():
        lines += [f"## {title}", "", "| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option, context) for option in options]
        lines.append("")
    return "\n".join(lines)


def _row(option: Any, context: Any) -> str:
    argument = not option.opts[0].startswith("-")
    written = option.name.upper() if argument else ", ".join([*option.opts, *option.secondary_opts])
    flag = getattr(option, "is_flag", False)
    value = "" if flag or argument else (option.metavar or option.display_type(context))
    default = option.show_default if isinstance(option.show_default, str) else option.default
    shown = "" if flag or not option.show_default or default in (None, (), []) else f"`{default}`"
    return "|".join(["", *map(_cell, (f"`{written}`", f"`{value}`" if value else "", shown, option.help or "")), ""])


def _cell(text: str) -> str:
    """A cell of a table: bars outside code are escaped, those inside need not be."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
    return f" {'`'.join(parts)} "


def _python_pages() -> dict[str, str]:
    lines = [
        "# Python",
        "",
        "The public names, all in `dit_accel`. These pages are made from the docstrings.",
        "",
        "```python",
        "import dit_accel",
        "",
        "print(dit_accel.list_methods(), dit_accel.list_families())",
        "```",
        "",
        "| name | module |",
        "|---|---|",
        *(f"| [`{name}`]({name}.md) | `{_module(name)}` |" for name in dit_accel.__all__),
    ]
    return {"python/index.md": "\n".join(lines)} | {
        f"python/{name}.md": f"::: {_read_from(name)}.{name}\n" for name in dit_accel.__all__
    }


def _module(name: str) -> str:
    """The module that defines a public name, as `dit_accel` itself looks it up."""
    return f"dit_accel.{dit_accel._HOME[name]}"


def _read_from(name: str) -> str:
    """The same, as griffe finds it: a folder without `__init__.py`, such as `pipelines`, through the root's link."""
    _, *folders, module = _module(name).split(".")
    inside = Path(dit_accel.__file__).parent.joinpath(*folders)
    return _module(name) if (inside / "__init__.py").exists() else ".".join([*folders, module])
