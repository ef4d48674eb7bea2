"""What tests read from the documents: blocks of code, command lines, sections, and commands made small."""

import re
import shlex

LAUNCHED = "accelerate launch -m dit_accel "


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """Command lines of a page's shell blocks; a backslash at the end of a line joins it with the next."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def typed(text: str) -> list[str]:
    """The commands of `dit-accel` among them, as one process runs them."""
    lines = (line.replace(LAUNCHED, "dit-accel ") for line in commands(text))
    return [line for line in lines if line.startswith("dit-accel ")]


def words(command: str) -> list[str]:
    """Verb and arguments of a command, without its comment."""
    return shlex.split(command, comments=True)[1:]


def section(text: str, title: str | None) -> str:
    """The text of a section; None: what precedes the first."""
    return text.partition("\n## ")[0] if title is None else text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def value(arguments: list[str], option: str) -> str | None:
    """The value of an option of a command, or None."""
    return arguments[arguments.index(option) + 1] if option in arguments else None


def small(arguments: list[str], **sizes: int) -> list[str]:
    """A command with these options besides: of an option that stands twice, the command line takes the last."""
    return [*arguments, *(text for name, size in sizes.items() for text in (f"--{name}", str(size)))]
