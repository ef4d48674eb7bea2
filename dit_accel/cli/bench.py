"""`dit-accel bench`: declared measurements of the attention operators against the best dense attention."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from dit_accel import registry
from dit_accel.bench import results
from dit_accel.cli import Interrupted
from dit_accel.cli.options import JsonOptions, command
from dit_accel.errors import DitAccelError
from dit_accel.files import append, check_file, replace_file, staged
from dit_accel.generation.request import METHOD_FORM, DeviceOptions
from dit_accel.values import option

if TYPE_CHECKING:
    import torch

    from dit_accel.bench.rows import Declared, ModelStep, Row
    from dit_accel.bench.run import RowOutcome

NOT_MEASURED = 1
# Columns of the tables: the fields of a row, and `title` (the setting as typed) and `memory` (GiB).
OPERATORS = {
    "row": "{title}\n  {shape} {dtype} {direction} {impl}",
    "kept": "{density:.3f}",
    "ms": "{ms_p50:.2f}",
    "dense": "{baseline_ms_p50:.2f}",
    "speed-up": "{speedup:.2f}",
    "TFLOP/s": "{tflops_kept:.3g}",
}
STEPS = {
    "step": "{model} {mode}\n  {method} {setting}",
    "density": "{density:.4f}",
    "ms": "{step_ms_p50:.1f}",
    "dense ms": "{dense_step_ms_p50:.1f}",
    "rest ms": "{rest_ms_p50:.1f}",
    "speed-up": "{speedup:.2f}",
    "share": "{attention_share:.2f}",
    "GiB": "{memory}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(JsonOptions, DeviceOptions):
    """The options of `dit-accel bench`."""

    rows: str | None = option(None, "Only rows whose name matches, such as '*/gna/0.1/*'.", metavar="GLOB")
    models: bool = option(False, "Steps of whole models with random weights, not the operators alone.")
    shape: tuple[str, ...] = option(
        (), "Model and size, repeatable. Not given: cpu on a CPU, all others on a GPU.", metavar="NAME", repeatable=True
    )
    method: tuple[str, ...] = option(
        (), "Repeatable; without settings, those for the densities are found.", metavar=METHOD_FORM, repeatable=True
    )
    density: tuple[float, ...] = option((), "Share of pairs kept, repeatable, such as 0.1.", repeatable=True)
    dtype: tuple[str, ...] = option((), "float32, bfloat16 or float16, repeatable.", metavar="NAME", repeatable=True)
    direction: tuple[str, ...] = option((), "forward, backward or both, repeatable.", metavar="NAME", repeatable=True)
    mode: tuple[str, ...] = option((), "With --models: eager or compiled, repeatable.", metavar="NAME", repeatable=True)
    impl: str = option("auto", "The implementation; a named one runs or is refused.", metavar="NAME")
    peer: bool = option(False, "Also time FlexAttention, where it compiles.")
    seconds: float = option(2.0, "Time for each row, at least five rounds.", least=0, most=86_400)
    output: Path | None = option(None, "Each row is added to it as soon as it is measured.", metavar="FILE.jsonl")
    resume: bool = option(False, "Leave out rows that --output has from this commit and machine.")
    profile: Path | None = option(None, "Where each row's time goes, kernel by kernel.", metavar="FILE.txt")
    picture: Path | None = option(None, "Speed-up against density with the ideal line.", metavar="FILE.png")
    read: Path | None = option(None, "Measure nothing: show the rows of this file.", metavar="FILE.jsonl")
    break_even: Path | None = option(
        None, "With --read: the densities above which dense attention was faster.", metavar="FILE.json"
    )
    list: bool = option(False, "Measure nothing: list the declared rows.")
    count: bool = option(False, "Measure nothing: count the matrix products of each row, from its plan.")


@command(BenchOptions)
def bench(given: dict[str, Any]) -> int:
    """Time the attention methods against the best dense attention of this machine, after checking their results.

    A row whose results are further from fp64 than plain PyTorch in its dtype explains has no time, and the status is 1.

    Example: dit-accel bench --shape wan-14b-720p --density 0.1 --output rows.jsonl --picture rows.png
    """
    options = BenchOptions(**given)
    _check_files(options)
    if options.read is not None:
        selecting = ("rows", "models", "shape", "method", "density", "dtype", "direction", "mode", "peer", "profile")
        _refuse("--read shows every row of a file", given, selecting)
        _show_file(options, options.read)
        return 0
    if options.break_even is not None:
        raise DitAccelError("--break-even is made from measured rows. Give them with --read FILE.jsonl.")
    if options.models:
        _refuse("--models measures steps, not operators", given, ("dtype", "direction", "peer", "profile", "picture"))
    else:
        _refuse("without --models operators are measured, not steps", given, ("mode",))
    if options.count:
        _refuse("--count counts the work of operators", given, ("list", "models", "output", "picture"))
        from dit_accel.bench.run import count

        for row in cast("Sequence[Row]", _chosen(options, None)):
            work = count(row)
            least, most = work["tflop"]
            span = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
            text = f"{row.name}: {span} of {work['dense_tflop']:.4g} TFLOP"
            typer.echo(json.dumps(work) if options.json else text)
        return 0
    if options.list:
        rows = _chosen(options, None)
        typer.echo("\n".join(json.dumps(row.as_dict()) if options.json else row.name for row in rows))
        return 0

    from dit_accel.generation.call import placement
    from dit_accel.kernels import impls

    impls.check(options.impl)
    device = placement(options.device, "float32", "none")[0]
    rows = _chosen(options, device)
    if options.resume:
        rows = _left(rows, device, options.output)
        if not rows:
            typer.echo(f"{options.output} has all of these rows already.", err=True)
            return 0
    if options.models:
        from dit_accel.bench.steps import StepBench

        found = StepBench(device, options.impl, options.seconds).run(cast("Sequence[ModelStep]", rows))
    else:
        from dit_accel.bench.run import Bench

        if options.profile is not None:
            check_file(options.profile, (".txt",), option="--profile")
            replace_file(options.profile, b"")
        found = Bench(device, options.impl, options.seconds, options.peer, options.profile).run(
            cast("Sequence[Row]", rows)
        )
    return _measure(found, len(rows), options)


def _show_file(options: BenchOptions, path: Path) -> None:
    records = results.read(path)
    if not records:
        raise DitAccelError(f"{path} has no rows; `dit-accel bench --output {path}` adds them.")
    if options.picture is not None and not any("op" in record for record in records):
        raise DitAccelError(f"--picture shows operators, and {path} has no row of one. Leave it out.")
    if options.break_even is not None:
        from dit_accel.hooks.break_even import from_rows

        check_file(options.break_even, (".json",), option="--break-even")
        entries = from_rows([record for record in records if "op" in record], str(path))
        content = json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1)
        replace_file(options.break_even, f"{content}\n".encode())
    _show(records, options)


def _refuse(why: str, given: dict[str, Any], unused: Sequence[str]) -> None:
    """Refuse options without effect."""
    found = [f"--{name}" for name in unused if name in given]
    if found:
        raise DitAccelError(f"{why[0].upper()}{why[1:]}; leave out {', '.join(found)}.")


def _chosen(options: BenchOptions, device: torch.device | None) -> Sequence[Declared]:
    """The selected rows; without a device those of all machines."""
    from dit_accel.bench.rows import MethodSetting, select, select_steps

    settings = []
    for text in options.method:
        name, config = registry.parse_method(text)
        if config:
            registry.make_config(name, config)
        settings.append(MethodSetting(name, None, config or None))
    asked = (options.shape or None, settings or None, options.density or None)
    pattern = "*" if options.rows is None else options.rows
    if not options.models:
        here = None if options.shape or options.rows is not None or device is None else device.type
        return select(*asked, options.dtype or None, options.direction or None, pattern, here)
    if not options.shape and device is not None and device.type != "cuda":
        raise DitAccelError(
            "These models have up to 14 billion weights, and this machine has no GPU. Name one with --shape to try."
        )
    return select_steps(*asked, options.mode or None, pattern)


def _check_files(options: BenchOptions) -> None:
    from dit_accel.generation.output import IMAGE_ENDINGS, check_matplotlib

    if options.read is not None and (options.output is not None or options.list):
        raise DitAccelError("--read measures nothing, so it goes with neither --output nor --list.")
    if options.picture is not None:
        if options.list:
            raise DitAccelError("--list measures nothing, so there is no --picture to draw. Leave one of them out.")
        check_file(options.picture, IMAGE_ENDINGS, option="--picture")
        check_matplotlib()
    if options.output is not None:
        check_file(options.output, (".jsonl",))
        if options.output.exists():  # rows are added to files of rows alone
            results.read(options.output)


def _left(rows: Sequence[Declared], device: torch.device, output: Path | None) -> Sequence[Declared]:
    """The rows that the file lacks from this commit and machine."""
    from dit_accel.generation.provenance import provenance

    if output is None:
        raise DitAccelError("--resume continues --output FILE.jsonl. Give both.")
    if not output.exists():
        return rows
    fields = ("git", "gpu", "cpu")
    here = provenance(device)
    have = {record["row"] for record in results.read(output) if all(record[name] == here[name] for name in fields)}
    return [row for row in rows if row.name not in have]


def _measure(found: Iterator[RowOutcome], count: int, options: BenchOptions) -> int:
    """Measure and report; the status is 1 if a reachable row was not measured."""
    output = options.output
    outcomes: list[RowOutcome] = []
    try:
        for number, outcome in enumerate(found, 1):
            if outcome.record is not None and output is not None:
                append(output, outcome.record)
            typer.echo(f"{number}/{count} {outcome.row.name}: {_remark(outcome)}", err=True)
            outcomes.append(outcome)
    except KeyboardInterrupt as stop:
        measured = any(outcome.record is not None for outcome in outcomes)
        kept = f"; what was measured is in {output}" if measured and output is not None else ""
        raise Interrupted(f"interrupted after {len(outcomes)} of {count} rows{kept}.") from stop
    refused = [outcome for outcome in outcomes if outcome.status == "refused"]
    if len(refused) == len(outcomes):
        raise DitAccelError(f"No row could be measured. {refused[0].row.name}: {refused[0].reason}")
    _show([outcome.record for outcome in outcomes if outcome.record is not None], options)
    red = [outcome for outcome in outcomes if outcome.status == "red"]
    if red:
        typer.echo(f"{len(red)} of {count} rows were not timed, because their results are not exact.", err=True)
    return NOT_MEASURED if red or refused else 0


def _remark(outcome: RowOutcome) -> str:
    record = outcome.record
    if record is None:
        return f"{outcome.status}: {outcome.reason}"
    took = record["step_ms_p50"] if "model" in record else record["ms_p50"]
    return f"{took:.3f} ms, {record['speedup']:.2f} times as fast as {record['baseline']}"


def _show(records: list[dict[str, Any]], options: BenchOptions) -> None:
    operators, steps = ([record for record in records if ("op" in record) == wanted] for wanted in (True, False))
    if options.picture is not None and operators:
        with staged(options.picture) as stage:
            results.draw(operators, stage / options.picture.name)
    if options.json:
        typer.echo("\n".join(json.dumps(record) for record in records))
        return
    if operators:
        caption = "kept: share of the pairs; TFLOP/s: on kept pairs. Every row passed the numerics check."
        _print_table(operators, OPERATORS, caption)
    if steps:
        _print_table(steps, STEPS, "one call of the transformer; rest: what is not attention; share: of attention")


def _print_table(records: list[dict[str, Any]], columns: dict[str, str], caption: str) -> None:
    """A row for each record, under the names of their machines; the first column has names, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = ", ".join(sorted({record["gpu"] or record["cpu"] for record in records}))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, caption=caption)
    first, *numbers = columns
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for record in records:
        peak = record.get("peak_memory_bytes")
        more = {"title": record["row"].split("/")[1], "memory": "-" if peak is None else f"{peak / 2**30:.1f}"}
        table.add_row(*(form.format(**record, **more) for form in columns.values()))
    Console().print(table)
