"""`dit-accel train`: fine-tune a model with a sparse method at work, so that the quality comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli import Interrupted, options


def train(
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Settings to start from; other options win over it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="demo, a folder in Diffusers' format, or a Hub id; demo if no recipe says it.")
    ] = None,
    method: options.Method = None,
    settings: options.Settings = None,
    layer_schedule: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A layer schedule, in place of --method.")
    ] = None,
    dense_layers: options.DenseLayers = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="A folder (prepared, or captioned media), 'generated', or 'clips' (the demo's own)."
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE|LIST|FOLDER", help="For generated data; files have one a line.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Samples to make or take.")] = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT", help="flow, teacher, attention, final or consistency; repeatable, they add up."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in a micro-batch of one process.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Micro-batches in a step.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Of the LoRA; 0 trains all weights.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="no|bf16|fp16", help="Mixed precision.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other setting of TrainSettings, as ema=0.99 or levels.shift=5."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Generated on the way, every --validate-every steps; repeatable.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps between samples of --prompt.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, wandb, ..., as accelerate knows them.")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Make the training data in OUTPUT/data, and stop.")
    ] = False,
    search: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Train nothing: search a layer schedule.")
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,...", help="Settings to try in every layer, repeatable.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, help="Largest loss a layer may add, in a search.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, max=1, help="Mean density to reach, in a search.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of data order and noise.")] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Of the run; a run that was stopped goes on.")] = Path(
        "trained"
    ),
) -> None:
    """Fine-tune with sparse attention; several processes with `accelerate launch -m dit_accel train ...`.

    Example: dit-accel train --recipe sla-demo --output trained
    """
    from dit_accel import values
    from dit_accel.generation.choice import parse_layers
    from dit_accel.registry import parse_method
    from dit_accel.train import job
    from dit_accel.train.settings import read_recipe

    base = None if recipe is None else read_recipe(recipe)
    given: dict[str, Any] = job.read_options(option or [])
    if method is not None or settings:
        given["method"], given["config"] = parse_method(
            method or (base.train["method"] if base else "dense"), settings or ()
        )
    named = {
        "layer_schedule": None if layer_schedule is None else str(layer_schedule),
        "dense_layers": None if dense_layers is None else parse_layers(dense_layers),
        "objectives": job.read_objectives(objective) if objective else None,
        "steps": steps,
        "batch": batch,
        "accumulation": accumulation,
        "rate": rate,
        "rank": rank,
        "precision": precision,
        "validate_every": validate_every,
        "save_every": save_every,
        "tracker": tracker,
        "seed": seed,
    }
    given |= {name: value for name, value in named.items() if value is not None}
    if search is not None:
        given.setdefault("objectives", {"flow": 1.0})
        given["config"] = given.get("config") or next(iter(_candidates(given, candidate or [])), {})
    chosen = {"source": data, "frames": frames, "height": height, "width": width, "count": count}
    chosen["prompts"] = prompts
    source = dict(base.data if base else {}) | {name: value for name, value in chosen.items() if value is not None}
    request = job.Request(
        model=model or (base.model if base else "demo"),
        revision=revision,
        data=values.build(job.DataSettings, source, "The data"),
        train=job.merge(base.train if base else {}, given),
        output=output,
        prepare=prepare,
        prompts=tuple(prompt or ()),
        device=device,
        search=search,
        candidates=tuple(candidate or ()),
        threshold=threshold,
        budget=budget,
    )
    try:
        typer.echo("\n".join(job.run(request)))
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted; the same command goes on from {output / 'checkpoints'}.") from stop


def _candidates(given: dict[str, Any], texts: list[str]) -> list[dict[str, Any]]:
    from dit_accel.registry import parse_method

    return [parse_method(f"{given.get('method', 'dense')}:{text}")[1] for text in texts]
