"""The `dit-accel` command: its verbs, and how errors end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dit_accel import __version__
from dit_accel.cli import bench, env, generate, ls, plan, train
from dit_accel.cli.eval import evaluate
from dit_accel.errors import DitAccelError

USER_ERROR = 2

app = typer.Typer(
    name="dit-accel",
    help="Faster Diffusers diffusion transformers: sparse attention for unmodified pipelines, and what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (generate.generate, train.train, bench.bench, plan.plan, ls.ls, env.env):
    app.command()(verb)
app.command("eval")(evaluate)


def _print_version(asked: bool) -> None:
    if asked:
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
    """Run the command line and exit: 0 if all went well, 2 after one line on what the user can mend,
    130 after Ctrl-C.

    Args:
        arguments: what stands behind `dit-accel`; `sys.argv` if None.
    """
    try:
        status = app(args=arguments, prog_name="dit-accel", standalone_mode=False)
    except DitAccelError as error:
        _fail(str(error))
    except typer.TyperException as error:
        _fail(error.format_message() or "a verb is missing, such as generate.")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print(f"dit-accel: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)
