"""`dit-accel plan`: what a method would do on a grid, without running a model."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import options
from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid


def plan(
    method: Annotated[str, typer.Option(metavar="METHOD[:KEY=VALUE,...]", help="How attention is computed.")],
    settings: options.Settings = None,
    grid: Annotated[
        str | None, typer.Option(metavar="FxHxW", help="Tokens: frames, height and width, such as 30x48x80.")
    ] = None,
    text: Annotated[int | None, typer.Option(min=0, help="Text tokens in the sequence.")] = None,
    text_first: Annotated[bool, typer.Option("--text-first", help="The text stands before the visual tokens.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Instead of --grid: demo, a folder or a Hub id; only its JSON files are read.")
    ] = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    revision: options.Revision = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Save a picture of the block mask.")] = None,
    json: options.Json = False,
) -> None:
    """Show density, exact pairs, visited blocks and ideal speed-up of a method.

    Example: dit-accel plan --method gna:window=18x24x24,stride=16x8x8 --grid 30x48x80 --text 256
    """
    from dit_accel import registry

    if image is not None:
        from dit_accel.files import check_file
        from dit_accel.generation.output import IMAGE_ENDINGS

        check_file(image, IMAGE_ENDINGS, option="--image")
    name, config = registry.parse_method(method, settings or ())
    tokens = _grid(grid, text, text_first, model, (frames, height, width), revision)
    made = registry.plan(name, tokens, **config)
    facts = _facts(made)
    if image is not None:
        _save_image(made, image)
    if json:
        typer.echo(json_module.dumps(facts, indent=2))
    else:
        _print_table(facts)


def _grid(
    grid: str | None,
    text: int | None,
    text_first: bool,
    model: str | None,
    size: tuple[int | None, int | None, int | None],
    revision: str | None,
) -> TokenGrid:
    """The grid as given, or as a model makes it of a size in frames and pixels."""
    from dit_accel.tokens import TokenGrid

    if (grid is None) == (model is None):
        raise DitAccelError(
            "Give either --grid FxHxW, or --model with --frames, --height and --width; "
            f"{'neither came' if grid is None else 'both came'}."
        )
    if grid is not None:
        if any(size) or revision is not None:
            raise DitAccelError(
                "--frames, --height, --width and --revision belong to --model; --grid is in tokens already."
            )
        if not re.fullmatch(r"\d+x\d+x\d+", grid):
            raise DitAccelError(f"--grid is frames x height x width in tokens, such as 30x48x80; got {grid!r}.")
        t, h, w = (int(length) for length in grid.split("x"))
        return TokenGrid(t, h, w, text=text or 0, text_first=text_first)
    if text is not None or text_first:
        raise DitAccelError("--text and --text-first belong to --grid; a model says itself where its text stands.")

    from dit_accel.generation.sizes import sizes_of
    from dit_accel.generation.sources import find

    assert model is not None
    sizes = sizes_of(find(model, revision))
    return sizes.grid(*sizes.chosen(*size))


def _facts(plan: Plan) -> dict[str, Any]:
    """What is known of a plan before it runs."""
    import dataclasses

    return {
        "method": plan.method,
        "config": dataclasses.asdict(plan.config),
        "grid": dataclasses.asdict(plan.grid),
        "tokens": plan.grid.tokens,
        "pairs": plan.pairs,
        "density": plan.density,
        **_blocks(plan),
    }


def _blocks(plan: Plan) -> dict[str, Any]:
    """Block counts, and what a block holds. Where content decides, only the number of blocks is known."""
    from dit_accel.methods.sla import SlaPlan

    if isinstance(plan, SlaPlan):
        queries = keys = plan.order
        visited, total, full = plan.visited, plan.total, None
    else:
        blocks = plan.block_mask()
        queries, keys = blocks.query_order, blocks.key_order
        visited, total, full = blocks.visited, blocks.total, blocks.full
    return {
        "query_block": {"tokens": queries.block, "tile": queries.tile},
        "key_block": {"tokens": keys.block, "tile": keys.tile},
        "blocks_visited": visited,
        "blocks_full": full,
        "blocks_total": total,
        "block_density": visited / total,
        # Dense attention has no padding slots, so they count against the method.
        "ideal_speedup": plan.grid.tokens**2 / (visited * queries.block * keys.block),
    }


def _save_image(plan: Plan, path: Path) -> None:
    from dit_accel.files import staged

    with staged(path) as stage:
        plan.image().save(stage / path.name)


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from dit_accel.generation.choice import value_text

    grid = facts["grid"]
    sides = f"{grid['frames']}x{grid['height']}x{grid['width']}"
    text = f" + {grid['text']} text {'first' if grid['text_first'] else 'last'}" if grid["text"] else ""
    settings = ", ".join(f"{key}={value_text(value)}" for key, value in facts["config"].items())
    table = Table(show_header=False, box=None)
    table.add_row("method", f"{facts['method']} ({settings})" if settings else facts["method"])
    table.add_row("tokens", f"{facts['tokens']:,} ({sides}{text})")
    table.add_row("pairs", f"{facts['pairs']:,} of {facts['tokens'] ** 2:,}")
    table.add_row("density", f"{facts['density']:.4f}")
    table.add_row("blocks", _block_text(facts))
    table.add_row("visited", f"{facts['blocks_visited']:,} of {facts['blocks_total']:,} ({facts['block_density']:.4f})")
    if facts["blocks_full"] is not None:
        table.add_row("full", f"{facts['blocks_full']:,}")
    table.add_row(
        "ideal speed-up", f"{facts['ideal_speedup']:.2f} times dense attention, if every visited block costs the same"
    )
    Console().print(table)


def _block_text(facts: dict[str, Any]) -> str:
    names = []
    for side in ("query_block", "key_block"):
        block = facts[side]
        shape = f"{value} tile" if (value := "x".join(map(str, block["tile"] or ()))) else "raster"
        names.append(f"{block['tokens']} {'queries' if side == 'query_block' else 'keys'} ({shape})")
    return " x ".join(names)
