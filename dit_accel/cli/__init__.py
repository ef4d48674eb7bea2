"""The command line: one file a verb. Nothing heavy is imported before a verb runs, so that ``--help`` is instant."""

import shutil
import textwrap
from collections.abc import Iterable

BROKEN = 1  # the exit status where what was asked does not hold: a limit, a target, whether weights fit


class Interrupted(Exception):
    """Ctrl-C in a verb that knows what became of its work, which is the message."""


def show_lines(lines: Iterable[str], hang: int = 2) -> None:
    """Print lines, wrapped between words at the terminal's width; the rest of a line hangs by `hang` columns more."""
    width = shutil.get_terminal_size().columns
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + hang)
        wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        print(wrap.fill(line))
