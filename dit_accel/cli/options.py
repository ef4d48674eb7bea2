"""Options that several verbs share, so that they read and behave the same everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Method = Annotated[
    str | None,
    typer.Option(metavar="METHOD[:KEY=VALUE,...]", help="How attention is computed; `dit-accel ls` lists methods."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, repeatable; per axis as 18x24x24."),
]
DenseSteps = Annotated[
    str | None, typer.Option(metavar="N|SHARE", help="First denoising steps that stay dense, as 12 or 0.25.")
]
DenseLastSteps = Annotated[str | None, typer.Option(metavar="N|SHARE", help="Last denoising steps that stay dense.")]
DenseLayers = Annotated[
    str | None, typer.Option(metavar="N|SHARE|I,J", help="First layers that stay dense, or a list of layers.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of the video; the model's own number if not given.")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels; the model's own if not given.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels; the model's own if not given.")]
Fps = Annotated[int | None, typer.Option(min=1, max=100, help="Frames a second of videos.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own number if not given.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the model's own if not given.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to show.")]
PipeArguments = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other argument of the pipeline's call, repeatable; JSON values."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, else float32.")
]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu, ...; auto: a GPU if there is one.")]
Offload = Annotated[
    Literal["none", "model", "group"], typer.Option(help="Keep weights in main memory and move models or layers.")
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the transformer's blocks.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
