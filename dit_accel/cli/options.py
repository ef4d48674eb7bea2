"""Options that several verbs share, so that they read and behave the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Embedded model (demo), a folder in Diffusers' format, or an id on the Hugging Face Hub.")
]
Method = Annotated[
    str | None,
    typer.Option(metavar="METHOD[:KEY=VALUE,...]", help="How attention is computed; `dit-accel ls` lists methods."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, repeatable; per axis as 18x24x24."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of the video; the model's own number if not given.")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels; the model's own if not given.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels; the model's own if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Picture = Annotated[Path | None, typer.Option("--image", metavar="FILE.png", help="Save a picture of the block mask.")]
