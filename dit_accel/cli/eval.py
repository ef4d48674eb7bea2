"""`dit-accel eval`: what each method makes of a model's quality and speed, in one table and one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from dit_accel.cli import BROKEN, Interrupted
from dit_accel.cli.options import command
from dit_accel.errors import DitAccelError
from dit_accel.eval.request import EvalRequest
from dit_accel.generation.request import (
    CACHE_FORM,
    LOAD_FORM,
    METHOD_FORM,
    MethodOptions,
    ScheduleOptions,
    Subject,
)
from dit_accel.pipelines.levels import LEVELS
from dit_accel.values import option

SHOWN = 2  # metrics in the terminal; the report has all

if TYPE_CHECKING:
    from dit_accel.generation.candidate import Candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedMethods(ScheduleOptions):
    """Which methods are compared, and where else their figures go."""

    PANEL: ClassVar[str] = "Method"

    method: tuple[str, ...] = option(
        (), "Method to evaluate, repeatable; `dit-accel ls` lists them.", metavar=METHOD_FORM, repeatable=True
    )
    load: tuple[Path, ...] = option(
        (),
        "A saved accelerator, a setting or published weights as a further method, repeatable.",
        metavar=LOAD_FORM,
        repeatable=True,
    )
    settings: tuple[str, ...] = option(
        (),
        "A setting for all published weights of --load, repeatable. Settings of a --method follow its name.",
        flag="--set",
        metavar="KEY=VALUE",
        repeatable=True,
    )
    level: tuple[str, ...] = option(
        (),
        "Settings and step cache for this model, size and number of steps as a further method, repeatable.",
        metavar="|".join(LEVELS),
        repeatable=True,
    )
    cache: tuple[str, ...] = option(  # type: ignore[assignment]  # one in the other verbs
        (),
        "Step cache, repeatable: every method runs with each of them. none: without a cache.",
        metavar=CACHE_FORM,
        repeatable=True,
    )
    write_card: bool = option(False, "Also write the results of each --load into its model card.")
    suite: str | None = option(
        None,
        "YAML file with the options of an evaluation; options on the command line take precedence.",
        metavar="FILE|NAME",
    )

    def candidates(self, subject: Callable[[], Subject] | None = None) -> tuple[Candidate, ...]:
        """The methods of --method and --load, each with every --cache; dense attention with it where neither came.

        Those of --level follow, which bring their caches; `subject` is as in `MethodOptions.candidate`.
        """
        from dit_accel.generation.candidate import Candidate

        words = {name: value for name, value in self.words.items() if name != "cache"}
        backend = self.dense_backend
        if not self.method and not self.level and set(words) - {"dense_backend"}:
            raise DitAccelError("--dense-* change the methods of --method and --level. Name one, or leave them out.")
        if backend and not (self.method or self.load or self.cache or self.level):
            raise DitAccelError("--dense-backend changes the methods of --method and --load. Name one of them.")
        if self.settings and not self.load:
            raise DitAccelError(
                "--set changes published weights. Name them with --load, or write --method NAME:KEY=VALUE."
            )
        methods: list[dict[str, Any]] = [{"method": text, **words} for text in self.method]
        methods += [{"load": path, "settings": self.settings, "dense_backend": backend} for path in self.load]
        if self.cache and not methods:
            methods = [{"method": "dense", "dense_backend": backend}]
        every = [MethodOptions(**method, cache=cache) for method in methods for cache in self.cache or [None]]
        levels: dict[str, Candidate] = {}  # two may have one setting
        for level in self.level:
            candidate = MethodOptions(level=level, **words).candidate(subject)  # type: ignore[arg-type]  # it checks
            same = levels.get(candidate.label, Candidate())
            levels[candidate.label] = dataclasses.replace(candidate, notes=(*same.notes, *candidate.notes))
        return (*(options.candidate() for options in every), *levels.values())


@command(ComparedMethods, EvalRequest)
def evaluate(compared: dict[str, Any], typed: dict[str, Any]) -> int:
    """Compare methods with the untouched pipeline: speed, likeness, distribution, and pictures of both.

    Run the same command again to resume a run that was stopped.

    Example: dit-accel eval --model demo --prompts demo --method gna:window=0.5 --method radial --output outputs/eval
    """
    from dit_accel.eval import quality
    from dit_accel.eval import suite as suites
    from dit_accel.eval.report import markdown
    from dit_accel.generation import sources
    from dit_accel.train import card

    comparison = ComparedMethods(**compared)
    request = EvalRequest(**(suites.read(comparison.suite, typed) if comparison.suite else {}) | typed)
    if candidates := comparison.candidates(lambda: request.subject(sources.find(request.model, request.revision))):
        request = dataclasses.replace(request, methods=candidates)
    saved = [None if method.published else method.folder for method in request.methods] if comparison.write_card else []
    if comparison.write_card and not any(saved):
        raise DitAccelError("--write-card writes into the model card of a saved accelerator. Add --load FOLDER.")
    for folder in filter(None, saved):
        card.split(folder)
    try:
        summary, broken = quality.run(request)
    except KeyboardInterrupt as stop:
        raise Interrupted(goes_on(request.output)) from stop
    if summary is not None:
        show(summary)
        if comparison.write_card:
            for folder, row in zip(saved, summary["rows"][1:], strict=True):
                if folder is not None:
                    card.write_quality(folder, markdown.excerpt(summary, row["label"]))
        typer.echo(f"report:  {request.output / 'report.html'}\nresults: {request.output / 'results.jsonl'}")
    for line in broken:
        typer.echo(f"dit-accel: {line}.", err=True)
    return BROKEN if broken else 0


def goes_on(output: Path) -> str:
    """What became of interrupted work in a folder."""
    if output.is_dir():
        return f"interrupted. Run the same command to continue; what is done is in {output}."
    return "interrupted; nothing was written."


def show(summary: dict[str, Any]) -> None:
    """Print the rows of a summary as a table, and its verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dit_accel.eval.report import fields

    metrics = summary["metrics"][:SHOWN]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("speed-up", "density", *(metric["name"].replace("[", "\n[") for metric in metrics)):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for row in summary["rows"]:
        figures = (fields.cell(row["figures"][metric["name"]]["value"], metric) for metric in metrics)
        table.add_row(row["label"], fields.times(row["speedup"]), fields.share(row["density"]), *figures)
    console = Console()
    console.print(table)
    for remark in summary["made"]["left_out"]:
        console.print(f"{remark}.", highlight=False, markup=False)
    for line in summary["verdict"]:
        console.print(line["text"], highlight=False, markup=False)
        if line.get("command"):
            console.print(f"  {line['command']}", highlight=False, markup=False, soft_wrap=True)
