"""`dit-accel generate`: a video or an image with accelerated attention, and beside it what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import Interrupted, options
from dit_accel.errors import DitAccelError

PROMPT = "a red circle moves right on a blue background"  # what the embedded model knows


def generate(
    model: Annotated[
        str, typer.Option(help="demo, a folder in Diffusers' format, or an id on the Hugging Face Hub.")
    ] = "demo",
    prompt: Annotated[str | None, typer.Option(help=f"What to show. [default: {PROMPT}]")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|LIST|FOLDER",
            help="One a line; demo, general; captioned images or videos. An output for each, shared out among the "
            "processes of `accelerate launch`; given again, the command goes on where it was stopped.",
        ),
    ] = None,
    negative_prompt: options.NegativePrompt = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for image-to-video models.")] = None,
    method: options.Method = None,
    settings: options.Settings = None,
    dense_steps: options.DenseSteps = None,
    dense_last_steps: options.DenseLastSteps = None,
    dense_layers: options.DenseLayers = None,
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
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; the same noise on every device.")] = 0,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    fps: options.Fps = None,
    pipe: options.PipeArguments = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    vae_tiling: options.VaeTiling = False,
    compile: options.Compile = False,
    revision: options.Revision = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="mp4, gif or png by its ending; a JSON record lies beside it. With --prompts a number is put behind "
            "the name, and NAME.jsonl lists all of them.",
        ),
    ] = None,
) -> None:
    """Generate a video or an image with accelerated attention.

    Example: dit-accel generate --model demo --method radial --set decay=0.5 --compare --output circle.mp4
    """
    asked = locals()
    from dit_accel.cli import batch, job

    if prompt is not None and prompts is not None:
        raise DitAccelError("--prompt and --prompts both say what to show; leave one of them out.")
    request = job.Request(**asked | {"prompt": PROMPT if prompt is None else prompt})
    if prompts is not None:
        batch.run(request)
        return
    try:
        lines = job.run(request)
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted; nothing was written.") from stop
    typer.echo("\n".join(lines))
