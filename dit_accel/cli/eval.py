"""`dit-accel eval`: what each method makes of a model's quality and speed, in one table and one report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import Interrupted, options
from dit_accel.errors import DitAccelError

BROKEN = 1  # the exit status where a limit does not hold
SHOWN = 2  # metrics in the terminal; the report has all
MOST_SEEDS = 10_000  # each is a sample of every method and prompt

if TYPE_CHECKING:
    from dit_accel.generation.choice import Choice


# What a suite may say, and the type of each value (of each item, where there are several).
SUITE_KEYS: dict[str, type] = {
    "model": str,
    "revision": str,
    "prompts": str,
    "negative_prompt": str,
    "seeds": int,
    "methods": object,
    "steps": int,
    "guidance": float,
    "frames": int,
    "height": int,
    "width": int,
    "fps": int,
    "pipe": str,
    "metrics": str,
    "real": Path,
    "require": str,
    "attention_report": str,
    "pictures": int,
    "dtype": str,
    "compile": bool,
    "vae_tiling": bool,
}


def evaluate(
    model: Annotated[str | None, typer.Option(help="demo, a folder in Diffusers' format, or an id on the Hub.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE|LIST|FOLDER", help="One a line; demo, general; captioned images or videos."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N|N-N", help="Of the noise, such as 0,1,2 or 0-3.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[:KEY=VALUE,...]", help="Repeatable; `dit-accel ls` lists methods."),
    ] = None,
    load: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="A saved accelerator as a further method, repeatable.")
    ] = None,
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Also put the figures of each --load into its model card.")
    ] = False,
    dense_steps: options.DenseSteps = None,
    dense_last_steps: options.DenseLastSteps = None,
    dense_layers: options.DenseLayers = None,
    suite: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="All of this in YAML; options given here win over it.")
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    fps: options.Fps = None,
    pipe: options.PipeArguments = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[[NETWORK]]", help="Such as psnr or fid[demo-clip], repeatable; all if not."),
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Real images or videos for FID and KID; the dense outputs if not given."),
    ] = None,
    require: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="Such as 'psnr>=25,speedup>=1.5'; status 1 if one breaks.")
    ] = None,
    attention_report: Annotated[
        str | None,
        typer.Option(metavar="steps=0,8,layers=all", help="Also map each layer's error and kept mass at these steps."),
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=0, help="Prompts to show in the report; 4 if not given.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    vae_tiling: options.VaeTiling = False,
    compile: options.Compile = False,
    revision: options.Revision = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Dense outputs to share between evaluations; OUTPUT/references if not."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For report.html, results.jsonl, summary.json and summary.md.")
    ] = Path("evaluation"),
) -> int:
    """Compare methods with the untouched pipeline: speed, likeness, distribution, and pictures of both.

    A run that was stopped goes on where it stopped when it is started again.

    Example: dit-accel eval --model demo --prompts demo --method gna:window=0.5 --method radial --output outputs/eval
    """
    from dit_accel.eval import quality
    from dit_accel.eval import suite as suites
    from dit_accel.generation.choice import choose
    from dit_accel.train import card

    schedule = (dense_steps, dense_last_steps, dense_layers)
    chosen = [choose(text, None, None, *schedule) for text in method or ()]
    chosen += [choose(None, None, folder, None, None, None) for folder in load or ()]
    if any(part is not None for part in schedule) and not method:
        raise DitAccelError("--dense-steps, --dense-last-steps and --dense-layers belong to --method, and none came.")
    typed = {
        "model": model,
        "revision": revision,
        "prompts": prompts,
        "negative_prompt": negative_prompt,
        "seeds": None if seeds is None else _seeds(seeds),
        "methods": chosen or None,
        "steps": steps,
        "guidance": guidance,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
        "pipe": pipe or None,
        "metrics": metric or None,
        "real": real,
        "require": require,
        "attention_report": attention_report,
        "pictures": pictures,
        "dtype": None if dtype == "auto" else dtype,
        "compile": compile or None,
        "vae_tiling": vae_tiling or None,
    }
    asked: dict[str, Any] = {} if suite is None else suites.read(suite, SUITE_KEYS)
    asked |= {name: value for name, value in typed.items() if value is not None}
    if "seeds" in asked:
        asked["seeds"] = list(dict.fromkeys(asked["seeds"]))
    asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    folders = [choice.folder for choice in asked.get("methods", ()) if choice.folder is not None] if write_card else []
    if write_card and not folders:
        raise DitAccelError("--write-card writes into the model card of a --load, and none came.")
    for folder in folders:
        card.check(folder)
    try:
        summary, broken = quality.run(
            quality.EvalRequest(**asked, device=device, offload=offload, cache=cache, output=output)
        )
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted; the same command goes on with what is in {output}.") from stop
    if summary is not None:
        _print(summary)
        if write_card:
            _write_cards(summary, asked["methods"])
        typer.echo(f"report:  {output / 'report.html'}\nresults: {output / 'results.jsonl'}")
    for line in broken:
        typer.echo(f"dit-accel: {line}.", err=True)
    return BROKEN if broken else 0


def _write_cards(summary: dict[str, Any], methods: Sequence[Choice]) -> None:
    """Put the row of every method that was loaded into the model card beside it."""
    from dit_accel.eval.report.markdown import excerpt
    from dit_accel.train import card

    for choice, row in zip(methods, summary["rows"][1:], strict=True):
        if choice.folder is not None:
            card.write_quality(choice.folder, excerpt(summary, row["label"]))


def _seeds(text: str) -> list[int]:
    """Numbers and spans of numbers with commas between them."""
    found: list[range] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None or (span[2] and int(span[2]) < int(span[1])):
            raise DitAccelError(f"--seeds are numbers and spans, such as 0,1,2 or 0-3; got {text!r}.")
        found.append(range(int(span[1]), int(span[2] or span[1]) + 1))
    count = sum(span.stop - span.start for span in found)  # len() ends at 2**63
    if count > MOST_SEEDS:
        raise DitAccelError(f"--seeds {text} are {count:,} seeds, and an evaluation takes at most {MOST_SEEDS:,}.")
    return [seed for span in found for seed in span]


def _print(summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics = summary["metrics"][:SHOWN]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("speed-up", "density", *(metric["name"].replace("[", "\n[") for metric in metrics)):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for row in summary["rows"]:
        values = [row["figures"][metric["name"]]["value"] for metric in metrics]
        table.add_row(row["label"], f"{row['speedup']:.2f}", f"{row['density']:.3f}", *map(_number, values))
    console = Console()
    console.print(table)
    for remark in summary["made"]["left_out"]:
        console.print(f"{remark}.", highlight=False, markup=False)
    for line in summary["verdict"]:
        console.print(line["text"], highlight=False, markup=False)
        if line.get("command"):
            console.print(f"  {line['command']}", highlight=False, markup=False, soft_wrap=True)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
