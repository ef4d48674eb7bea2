"""`dit-accel bench`: declared measurements of the attention operators against the best dense attention."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dit_accel import registry
from dit_accel.bench import results
from dit_accel.cli import Interrupted
from dit_accel.cli.options import JsonOptions, command
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, append, check_file, check_ours, replace_file, staged
from dit_accel.generation.request import METHOD_FORM, DeviceOptions
from dit_accel.setting import Setting
from dit_accel.values import option

if TYPE_CHECKING:
    import torch

    from dit_accel.bench.rows import Row, Target
    from dit_accel.bench.run import RowOutcome

NOT_MEASURED = 1
COLUMNS = {  # fields of a row, and `title`, the setting as typed
    "row": "{title}\n  {shape} {dtype} {direction} {impl}",
    "kept": "{density:.3f}",
    "ms": "{ms_p50:.2f}",
    "dense": "{baseline_ms_p50:.2f}",
    "speed-up": "{speedup:.2f}",
    "TFLOP/s": "{tflops_kept:.3g}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(JsonOptions, DeviceOptions):
    """The options of `dit-accel bench`."""

    rows: str | None = option(None, "Only rows whose name matches, such as '*/gna/0.1/*'.", metavar="GLOB")
    shape: tuple[str, ...] = option(
        (), "Model and size, repeatable. Default: cpu on a CPU, all others on a GPU.", metavar="NAME", repeatable=True
    )
    method: tuple[str, ...] = option(
        (),
        "Method to time, repeatable. Without settings, bench looks for some at each density.",
        metavar=METHOD_FORM,
        repeatable=True,
    )
    density: tuple[float, ...] = option(
        (), "Share of pairs to keep, such as 0.1, repeatable.", metavar="SHARE", repeatable=True
    )
    dtype: tuple[str, ...] = option((), "float32, bfloat16 or float16, repeatable.", metavar="NAME", repeatable=True)
    direction: tuple[str, ...] = option((), "forward, backward or both, repeatable.", metavar="NAME", repeatable=True)
    impl: str = option(
        "auto",
        "Implementation of the kernels. One that you name runs or is refused; nothing replaces it.",
        metavar="NAME",
    )
    peer: bool = option(False, "Also time FlexAttention, where it compiles.")
    seconds: float = option(2.0, "Seconds to measure each row; at least five rounds run.", least=0, most=86_400)
    output: Path | None = option(
        None, "File for the rows; each is added as soon as it is measured.", metavar="FILE.jsonl"
    )
    resume: bool = option(False, "Skip rows that --output already has from this commit, machine and --impl.")
    profile: Path | None = option(None, "File for a profile of each row, kernel by kernel.", metavar="FILE.txt")
    picture: Path | None = option(None, "Plot of speed-up against density, with the ideal line.", metavar="FILE.png")
    read: Path | None = option(None, "Do not measure: show the rows of this file.", metavar="FILE.jsonl")
    list: bool = option(False, "Do not measure: list the declared rows.")
    count: bool = option(False, "Do not measure: count the matrix products of each row, from its plan.")


@command(BenchOptions)
def bench(typed: dict[str, Any]) -> int:
    """Time the attention methods against the best dense attention of this machine, after checking their results.

    A row is timed only if its results are about as close to fp64 as those of plain PyTorch in the same dtype.
    The exit status is 1 if a row is not timed.

    Example: dit-accel bench --shape wan-14b-720p --density 0.1 --output rows.jsonl --picture rows.png
    """
    options = BenchOptions(**typed)
    _check_files(options)
    if options.read is not None:
        selecting = ("rows", "shape", "method", "density", "dtype", "direction", "peer", "profile")
        _refuse("--read shows every row of a file", typed, selecting)
        _show_file(options, options.read)
        return 0
    if options.count:
        _refuse("--count counts the work of operators", typed, ("list", "output", "picture"))
        from dit_accel.bench.run import count

        balances: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
        for row in _chosen(options, None):
            work = count(row)
            least, most = work["tflop"]
            span = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
            text = f"{row.name}: {span} of {work['dense_tflop']:.4g} TFLOP"
            typer.echo(json.dumps(work) if options.json else text)
            balances[row.target.method, row.shape.heads] = work["ulysses"]
        for (method, heads), balance in balances.items() if not options.json else ():
            for gpus, (before, after) in balance.items():
                typer.echo(
                    f"{method} at its defaults, {heads} heads, {gpus} GPUs by Ulysses: the busiest has {before:.3f} "
                    f"times the mean, {after:.3f} if heads are given by the last step (simulated)"
                )
        return 0
    if options.list:
        rows = _chosen(options, None)
        typer.echo("\n".join(json.dumps(row.as_dict()) if options.json else row.name for row in rows))
        return 0

    from dit_accel.bench.run import Bench
    from dit_accel.generation.setup import placement
    from dit_accel.kernels import impls

    impls.check(options.impl)
    device = placement(options.device, "float32", "none")[0]
    rows = _chosen(options, device)
    if options.resume:
        known = names_in(options.output, device, options.impl)
        rows = [row for row in rows if row.name not in known]
        if not rows:
            typer.echo(f"{options.output} already has all of these rows.", err=True)
            return 0
    if options.profile is not None:
        check_file(options.profile, (".txt",), option="--profile")
        check_ours([options.profile], "--profile")
        replace_file(options.profile, f"{MARK}\n".encode())
    outcomes = Bench(device, options.impl, options.seconds, options.peer, options.profile).run(rows)
    records, status = measured(outcomes, len(rows), options.output)
    _show(records, options)
    return status


def _show_file(options: BenchOptions, path: Path) -> None:
    records = results.read(path)
    if not records:
        raise DitAccelError(f"{path} has no rows. Measure some with `dit-accel bench --output {path}`.")
    _show(records, options)


def _refuse(why: str, typed: dict[str, Any], unused: Sequence[str]) -> None:
    """Refuse options without effect."""
    without_effect = [f"--{name}" for name in unused if name in typed]
    if without_effect:
        raise DitAccelError(f"{why}; leave out {', '.join(without_effect)}.")


def _chosen(options: BenchOptions, device: torch.device | None) -> list[Row]:
    """The selected rows; without a device those of all machines."""
    from dit_accel.bench.rows import select

    here = None if options.shape or options.rows is not None or device is None else device.type
    return select(
        options.shape,
        targets_of(options.method),
        options.density,
        options.dtype,
        options.direction,
        "*" if options.rows is None else options.rows,
        here,
    )


def targets_of(texts: Iterable[str]) -> list[Target]:
    """What to measure, from methods as typed; one without settings is measured at the densities."""
    from dit_accel.bench.rows import Target

    targets = []
    for text in texts:
        if text in registry.get_methods():
            targets.append(Target(text))
            continue
        setting = Setting.parse(text)
        if words := setting.words():
            raise DitAccelError(f"bench measures one attention call; leave {', '.join(words)} out of {text!r}.")
        targets.append(Target(setting.method, None, setting))
    return targets


def _check_files(options: BenchOptions) -> None:
    from dit_accel.generation.output import IMAGE_ENDINGS, check_matplotlib

    if options.read is not None and (options.output is not None or options.list):
        raise DitAccelError("--read measures nothing. Leave out --output and --list.")
    if options.picture is not None:
        if options.list:
            raise DitAccelError("--list measures nothing, so there is no --picture to draw. Leave one of them out.")
        check_file(options.picture, IMAGE_ENDINGS, option="--picture")
        check_ours([options.picture], "--picture")
        check_matplotlib()
    if options.output is not None:
        check_file(options.output, (".jsonl",))
        if options.output.exists():  # rows are added to files of rows alone
            results.read(options.output)


def names_in(output: Path | None, device: torch.device, impl: str, field: str = "op") -> set[str]:
    """Names of the rows that the file has from this commit, machine and `--impl`; `field` as in `results.read`."""
    from dit_accel.generation.provenance import provenance

    if output is None:
        raise DitAccelError("--resume continues the file of --output. Add --output FILE.jsonl.")
    if not output.exists():
        return set()
    fields = ("git", "gpu", "cpu", "impl_asked")
    here = {**provenance(device), "impl_asked": impl}
    records = results.read(output, field)
    return {record["row"] for record in records if all(record.get(name) == here[name] for name in fields)}


def measured(
    running: Iterator[RowOutcome], count: int, output: Path | None, time: str = "ms_p50"
) -> tuple[list[dict[str, Any]], int]:
    """Measure `count` rows and tell how it goes; `time` is the field that has a row's milliseconds.

    The exit status, beside the records, is `NOT_MEASURED` if a reachable row was not measured.
    """
    outcomes: list[RowOutcome] = []
    try:
        for number, outcome in enumerate(running, 1):
            if (record := outcome.record) is None:
                remark = f"{outcome.status}: {outcome.reason}"
            else:
                remark = f"{record[time]:.3f} ms, {record['speedup']:.2f} times as fast as {record['baseline']}"
                if output is not None:
                    append(output, record)
            typer.echo(f"{number}/{count} {outcome.name}: {remark}", err=True)
            outcomes.append(outcome)
    except KeyboardInterrupt as stop:
        written = any(outcome.record is not None for outcome in outcomes) and output is not None
        where = f"; what was measured is in {output}" if written else ""
        raise Interrupted(f"interrupted after {len(outcomes)} of {count} rows{where}.") from stop
    refused = [outcome for outcome in outcomes if outcome.status == "refused"]
    if len(refused) == len(outcomes):
        raise DitAccelError(f"No row could be measured. {refused[0].name}: {refused[0].reason}")
    red = [outcome for outcome in outcomes if outcome.status == "red"]
    if red:
        typer.echo(
            f"{len(red)} of {count} rows were not timed, because their results failed the numerics check.", err=True
        )
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    return records, NOT_MEASURED if red or refused else 0


def _show(records: list[dict[str, Any]], options: BenchOptions) -> None:
    if options.picture is not None and records:
        with staged(options.picture) as stage:
            results.draw(records, stage / options.picture.name)
    if options.json:
        typer.echo("\n".join(json.dumps(record) for record in records))
    else:
        caption = "kept: share of the pairs; TFLOP/s: on kept pairs. Every row passed the numerics check."
        print_table(records, COLUMNS, caption)


def print_table(records: list[dict[str, Any]], columns: dict[str, str], caption: str) -> None:
    """A row for each record, under the names of their machines; the first column has names, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not records:
        return
    title = ", ".join(sorted({record["gpu"] or record["cpu"] for record in records}))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, caption=caption)
    first, *numbers = columns
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for record in records:
        title = record["row"].split("/")[1]
        table.add_row(*(form.format(**record, title=title) for form in columns.values()))
    Console().print(table)
