"""`dit-accel generate`: a video or an image with accelerated attention, and beside it what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dit_accel.cli.options import Frames, Height, Method, Model, Revision, Settings, Width
from dit_accel.errors import DitAccelError

PROMPT = "a red circle moves right on a blue background"  # what the embedded model knows


def generate(
    model: Model = "demo",
    prompt: Annotated[str | None, typer.Option(help=f"What to show. [default: {PROMPT}]")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|LIST|FOLDER",
            help="One a line; demo, general; captioned images or videos. An output for each, shared out among the "
            "processes of `accelerate launch`; given again, the command goes on where it was stopped.",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for image-to-video models.")] = None,
    method: Method = None,
    settings: Settings = None,
    dense_steps: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="First denoising steps that stay dense, as 12 or 0.25.")
    ] = None,
    dense_last_steps: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="Last denoising steps that stay dense.")
    ] = None,
    dense_layers: Annotated[
        str | None, typer.Option(metavar="N|SHARE|I,J", help="First layers that stay dense, or a list of layers.")
    ] = None,
    preset: Annotated[
        bool, typer.Option("--preset", help="The method's recommended settings for this model; given ones win.")
    ] = False,
    load: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A saved accelerator (method, settings, weights).")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="PATH|ID", help="A LoRA for the transformer, repeatable.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare each layer's first sparse call with dense attention.")
    ] = False,
    keep_dense_above: Annotated[
        float | None,
        typer.Option(metavar="ERROR", help="Verify, and keep layers dense whose relative error is above this."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate densely; show both side by side with times, PSNR, SSIM.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; the model's own number if not given.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; the same noise on every device.")] = 0,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    fps: Annotated[int | None, typer.Option(min=1, max=100, help="Frames a second of the video.")] = None,
    pipe: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other argument of the pipeline's call, repeatable; JSON values."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu, ...; auto: a GPU if there is one.")] = "auto",
    offload: Annotated[
        Literal["none", "model", "group"], typer.Option(help="Keep weights in main memory and move models or layers.")
    ] = "none",
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the transformer's blocks.")] = False,
    revision: Revision = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="mp4, gif or png by its ending; a JSON record lies beside it. With --prompts a number is put behind "
            "the name, and NAME.jsonl lists all of them.",
        ),
    ] = None,
) -> int:
    """Generate a video or an image with accelerated attention.

    Example: dit-accel generate --model demo --method radial --set decay=0.5 --compare --output circle.mp4
    """
    asked = locals()
    from dit_accel.cli import batch, job

    if prompt is not None and prompts is not None:
        raise DitAccelError("--prompt and --prompts both say what to show; leave one of them out.")
    request = job.Request(**asked | {"prompt": PROMPT if prompt is None else prompt})
    if prompts is not None:
        return batch.run(request)
    typer.echo("\n".join(job.run(request)))
    return 0
