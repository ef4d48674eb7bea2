"""`dit-accel bench`: declared measurements of the attention operators against the best dense attention."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from dit_accel.cli import Interrupted, options
from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    import torch

    from dit_accel.bench.rows import Declared, MethodSetting, ModelStep, Row
    from dit_accel.bench.run import RowOutcome

NOT_MEASURED = 1
ROWS_ENDING = (".jsonl",)

Impl = Literal["auto", "reference", "portable", "triton"]


def bench(
    rows: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only rows whose name matches, such as '*/gna/0.1/*'.")
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="Steps of whole models with random weights, not the operators alone.")
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Model and size, repeatable. Not given: cpu on a CPU, all others on a GPU."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[:KEY=VALUE,...]", help="Repeatable; without settings, those for the densities are found."
        ),
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of pairs kept, repeatable, such as 0.1.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16, repeatable.")
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="forward, backward or both, repeatable.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --models: eager or compiled, repeatable.")
    ] = None,
    impl: Annotated[Impl, typer.Option(help="Who computes; a named one runs or is refused.")] = "auto",
    peer: Annotated[bool, typer.Option("--peer", help="Also time FlexAttention, where it compiles.")] = False,
    seconds: Annotated[float, typer.Option(min=0, max=86_400, help="Time for each row, at least five rounds.")] = 2.0,
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Each row is added to it as soon as it is measured.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out rows that --output has from this commit and machine.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE.txt", help="Where each row's time goes, kernel by kernel.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Speed-up against density with the ideal line.")
    ] = None,
    read: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Measure nothing: show the rows of this file.")
    ] = None,
    break_even: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="With --read: the densities above which dense attention was faster."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Measure nothing: list the declared rows.")] = False,
    json: options.Json = False,
) -> int:
    """Time the attention methods against the best dense attention of this machine, after checking their results.

    A row whose results are further from fp64 than plain PyTorch in its dtype explains has no time, and the status is 1.

    Example: dit-accel bench --shape wan-14b-720p --density 0.1 --output rows.jsonl --picture rows.png
    """
    _check_files(output, picture, read, nothing_to_draw=list_)
    if read is not None:
        selecting: dict[str, Any] = {"--rows": rows, "--models": models or None, "--shape": shape, "--method": method}
        selecting |= {"--density": density, "--dtype": dtype, "--direction": direction, "--mode": mode}
        _refuse("--read shows every row of a file", selecting | {"--peer": peer or None, "--profile": profile})
        from dit_accel.bench.results import read as read_rows

        records = read_rows(read)
        if picture is not None and not any("op" in record for record in records):
            raise DitAccelError(f"--picture shows operators, and {read} has no row of one; leave it out.")
        if break_even is not None:
            _write_break_even(records, read, break_even)
        _show(records, picture, json=json)
        return 0
    if break_even is not None:
        raise DitAccelError("--break-even is made from measured rows: give them with --read FILE.jsonl.")

    settings = None if method is None else [_setting(text) for text in method]
    chosen_device = None if list_ else _device(device)
    chosen: Sequence[Declared]
    if models:
        of_operators = {"--dtype": dtype, "--direction": direction, "--peer": peer or None, "--profile": profile}
        _refuse("--models measures steps, not operators", of_operators | {"--picture": picture})
        chosen = _steps(shape, settings, density, mode, rows, chosen_device)
    else:
        _refuse("without --models operators are measured, not steps", {"--mode": mode})
        chosen = _rows(shape, settings, density, dtype, direction, rows, chosen_device)
    if chosen_device is None:
        _list(chosen, json=json)
        return 0
    if resume:
        chosen = _left(chosen, chosen_device, output)
        if not chosen:
            typer.echo(f"{output} has all of these rows already.", err=True)
            return 0
    if models:
        from dit_accel.bench.steps import StepBench

        found = StepBench(chosen_device, impl, seconds).run(cast("Sequence[ModelStep]", chosen))
    else:
        from dit_accel.bench.run import Bench

        writer = None if profile is None else _profile_writer(profile)
        found = Bench(chosen_device, impl, seconds, peer, writer).run(cast("Sequence[Row]", chosen))
    return _measure(found, len(chosen), output, picture, json=json)


def _profile_writer(path: Path) -> Callable[[str], None]:
    """Adds to a file that begins empty."""
    from dit_accel.files import check_file

    check_file(path, (".txt",), option="--profile")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")

    def write(text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return write


def _refuse(why: str, unused: dict[str, Any]) -> None:
    """Options that would do nothing."""
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise DitAccelError(f"{why[0].upper()}{why[1:]}; leave out {', '.join(given)}.")


def _rows(
    shapes: list[str] | None,
    settings: list[MethodSetting] | None,
    densities: list[float] | None,
    dtypes: list[str] | None,
    directions: list[str] | None,
    pattern: str | None,
    device: torch.device | None,
) -> Sequence[Row]:
    from dit_accel.bench.rows import select

    here = None if shapes is not None or pattern is not None or device is None else device.type
    return select(shapes, settings, densities, dtypes, directions, "*" if pattern is None else pattern, here)


def _steps(
    models: list[str] | None,
    settings: list[MethodSetting] | None,
    densities: list[float] | None,
    modes: list[str] | None,
    pattern: str | None,
    device: torch.device | None,
) -> Sequence[ModelStep]:
    from dit_accel.bench.rows import select_steps

    if models is None and device is not None and device.type != "cuda":
        raise DitAccelError(
            "These models have up to 14 billion weights, and this machine has no GPU; name one with --shape to try."
        )
    return select_steps(models, settings, densities, modes, "*" if pattern is None else pattern)


def _write_break_even(records: list[dict[str, Any]], source: Path, target: Path) -> None:
    import dataclasses

    from dit_accel.files import check_file, replace_file
    from dit_accel.hooks.break_even import from_rows

    check_file(target, (".json",), option="--break-even")
    entries = from_rows([record for record in records if "op" in record], str(source))
    content = json_module.dumps([dataclasses.asdict(entry) for entry in entries], indent=1)
    replace_file(target, f"{content}\n".encode())


def _check_files(output: Path | None, picture: Path | None, read: Path | None, *, nothing_to_draw: bool) -> None:
    from dit_accel.files import check_file
    from dit_accel.generation.output import IMAGE_ENDINGS, check_matplotlib

    if read is not None and (output is not None or nothing_to_draw):
        raise DitAccelError("--read measures nothing, so it goes with neither --output nor --list.")
    if picture is not None:
        if nothing_to_draw:
            raise DitAccelError("--list measures nothing, so there is no --picture to draw; leave one of them out.")
        check_file(picture, IMAGE_ENDINGS, option="--picture")
        check_matplotlib()
    if output is not None:
        check_file(output, ROWS_ENDING)
        if output.exists():  # rows are only ever added to a file of rows
            from dit_accel.bench.results import read as read_rows

            read_rows(output)


def _setting(text: str) -> MethodSetting:
    """A method without settings is asked for densities; with settings it is what they make it."""
    from dit_accel import registry
    from dit_accel.bench.rows import MethodSetting

    name, config = registry.parse_method(text)
    if config:
        registry.make_config(name, config)
    return MethodSetting(name, None, config or None)


def _device(device: str) -> torch.device:
    from dit_accel.generation.call import placement

    return placement(device, "float32", "none")[0]


def _left(rows: Sequence[Declared], device: torch.device, output: Path | None) -> Sequence[Declared]:
    """The rows that the file does not have from this commit and machine."""
    from dit_accel.bench.results import read
    from dit_accel.generation.provenance import provenance

    if output is None:
        raise DitAccelError("--resume goes on where --output FILE.jsonl ends; give both.")
    if not output.exists():
        return rows
    fields = ("git", "gpu", "cpu")
    here = provenance(device)
    have = {record["row"] for record in read(output) if all(record[name] == here[name] for name in fields)}
    return [row for row in rows if row.name not in have]


def _measure(found: Iterator[RowOutcome], count: int, output: Path | None, picture: Path | None, *, json: bool) -> int:
    """Measure and report; the status is 1 if a row that can be had was not measured."""
    from dit_accel.files import append

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
    _show([outcome.record for outcome in outcomes if outcome.record is not None], picture, json=json)
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


def _show(records: list[dict[str, Any]], picture: Path | None, *, json: bool) -> None:
    operators, steps = ([record for record in records if ("op" in record) == wanted] for wanted in (True, False))
    if picture is not None and operators:
        from dit_accel.bench.results import draw
        from dit_accel.files import staged

        with staged(picture) as stage:
            draw(operators, stage / picture.name)
    if json:
        typer.echo("\n".join(json_module.dumps(record) for record in records))
        return
    if operators:
        _print_operators(operators)
    if steps:
        _print_steps(steps)


def _list(rows: Sequence[Declared], *, json: bool) -> None:
    if json:
        typer.echo("\n".join(json_module.dumps(row.as_dict()) for row in rows))
    else:
        typer.echo("\n".join(row.name for row in rows))


def _print_operators(records: list[dict[str, Any]]) -> None:
    rows = [
        (
            "{op} {shape}\n  {dtype} {direction} {impl}".format(**record),
            f"{record['density']:.4f}",
            f"{record['ms_p50']:.2f}",
            f"{record['baseline_ms_p50']:.2f}",
            f"{record['speedup']:.2f}",
            f"{record['tflops_kept']:.3g}",
            f"{record['max_error']:.1e}",
        )
        for record in records
    ]
    columns = ("row", "density", "ms", "dense ms", "speed-up", "TFLOP/s", "error")
    caption = "density: pairs kept; TFLOP/s: on kept pairs; error: largest, against fp64"
    _print_table(records, columns, rows, caption)


def _print_steps(records: list[dict[str, Any]]) -> None:
    rows = []
    for record in records:
        peak = record["peak_memory_bytes"]
        rows.append(
            (
                "{model} {mode}\n  {method} {setting}".format(**record),
                f"{record['density']:.4f}",
                f"{record['step_ms_p50']:.1f}",
                f"{record['dense_step_ms_p50']:.1f}",
                f"{record['rest_ms_p50']:.1f}",
                f"{record['speedup']:.2f}",
                f"{record['attention_share']:.2f}",
                "-" if peak is None else f"{peak / 2**30:.1f}",
            )
        )
    columns = ("step", "density", "ms", "dense ms", "rest ms", "speed-up", "share", "GiB")
    caption = "one call of the transformer; rest: what is not attention; share: of attention"
    _print_table(records, columns, rows, caption)


def _print_table(
    records: list[dict[str, Any]], columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], caption: str
) -> None:
    """A row for each record, under the names of their machines; the first column holds names, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = ", ".join(sorted({record["gpu"] or record["cpu"] for record in records}))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, caption=caption)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
