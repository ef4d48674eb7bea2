"""The `dit-accel` command: its verbs, and how errors end."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn, TextIO

import typer

from dit_accel import __version__
from dit_accel.cli import Interrupted, bench, doctor, env, generate, ls, plan, serve, train, tune
from dit_accel.cli.eval import evaluate
from dit_accel.errors import DitAccelError, first_line, lost_process
from dit_accel.pipelines.quiet import quiet_libraries

USER_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143  # the exit statuses after Ctrl-C and SIGTERM, as shells have them

_terminated: list[int] = []  # the signal, once it has come

app = typer.Typer(
    name="dit-accel",
    help="Faster Diffusers diffusion transformers: sparse attention for unmodified pipelines, and what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    generate.generate, tune.tune, train.train, bench.bench, plan.plan, serve.serve, ls.ls, doctor.doctor, env.env,
):  # fmt: skip
    app.command()(verb)
app.command("eval")(evaluate)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dit_accel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    The status is 0 for success, 2 after a user's error, 130 after Ctrl-C, and 143 after SIGTERM. Without `arguments`
    they are those of `sys.argv`.
    """
    _terminated.clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a question mark for characters that the stream cannot show
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with quiet_libraries():
            warnings.showwarning = _show_warning  # until the block ends
            status = app(args=arguments, prog_name="dit-accel", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:  # typer's own, silent, answer to Ctrl-C
            _end("interrupted.", TERMINATED if _terminated else INTERRUPTED)
    except Interrupted as stop:
        _end(str(stop), TERMINATED if _terminated else INTERRUPTED)
    except DitAccelError as error:
        _end(f"error: {error}", USER_ERROR)
    except typer.TyperException as error:
        _end(f"error: {_refusal(error)}", USER_ERROR)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        why = first_line(error).partition(". ")[0]
        _end(
            f"error: another process of this run no longer answers ({why}). The one that failed first says why. Start "
            "all of them again to go on; finished work stays.",
            USER_ERROR,
        )
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        _end(f"error: the output could not be written: {error.strerror}.", USER_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


def _refusal(error: typer.TyperException) -> str:
    """Typer's sentence, with the value that came: Typer checks with pydantic, whose own error alone has the value."""
    sentence = error.format_message().replace(": Value error, ", ": ", 1) or "a verb is missing, such as generate."
    came = [repr(refused["input"]) for refused in getattr(error.__cause__, "errors", list)()]
    return sentence if not came or came[0] in sentence else f"{sentence.rstrip('.')}, got {came[0]}."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning in one line, without its place in the code."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _terminate(number: int, frame: object) -> NoReturn:
    """Let SIGTERM end a verb as Ctrl-C does, with a line on finished work."""
    _terminated.append(number)
    raise KeyboardInterrupt


def _end(message: str, status: int) -> NoReturn:
    print(f"dit-accel: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
