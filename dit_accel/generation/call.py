"""A loaded pipeline made ready for one generation: device, adapters, memory options, call arguments, warm-up."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.generation import sampling
from dit_accel.generation.sources import first_line, is_hub_id
from dit_accel.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

# Arguments of pipeline calls that have an option of their own.
OPTIONS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "generator": "--seed",
    "num_frames": "--frames",
    "height": "--height",
    "width": "--width",
    "num_videos_per_prompt": "--seed",
    "num_images_per_prompt": "--seed",
}
LENGTH = "max_sequence_length"  # of the text, in tokens
FRAME_RATES = ("frame_rate", "fps")  # what pipelines call it
NOT_OPTIONS = {"self", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}


def placement(device: str, dtype: str, offload: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that "auto" or a name stand for.

    Raises:
        DitAccelError: there is no such device here, or offloading was asked for without a GPU.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # which "meta" cannot
        chosen = torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise DitAccelError(f"--device {device} cannot be used here: {first_line(error)}") from error
    if offload != "none" and chosen.type == "cpu":
        raise DitAccelError(f"--offload {offload} moves weights between main memory and a GPU; on a CPU leave it out.")
    if dtype == "auto":
        dtype = "bfloat16" if chosen.type == "cuda" else "float32"
    return chosen, getattr(torch, dtype)


def open_image(path: Path | None) -> Image | None:
    """Read the picture for image-to-video.

    Raises:
        DitAccelError: it is missing or not a picture.
    """
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise DitAccelError(f"--image {path} is not a picture that Pillow can read.") from error
    except OSError as error:
        raise DitAccelError(f"--image {path} cannot be read: {error.strerror or error}.") from error


def prepare(pipe: DiffusionPipeline, loras: Iterable[str], *, vae_tiling: bool, compile: bool) -> None:
    """Load LoRAs, switch on tiling and compile the transformers' blocks, as asked.

    Raises:
        DitAccelError: the pipeline cannot, or a LoRA cannot be loaded.
    """
    names: list[str] = []
    for lora in loras:
        names.append(f"lora{len(names)}")
        _load_lora(pipe, lora, names[-1])
    if len(names) > 1:  # Diffusers leaves the last one active alone
        pipe.set_adapters(names)
    if vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise DitAccelError(f"--vae-tiling: the codec of this {type(pipe).__name__} has no tiling; leave it out.")
        pipe.vae.enable_tiling()
    if compile:
        for transformer in transformers(pipe):
            transformer.compile_repeated_blocks(fullgraph=True)


def transformers(pipe: DiffusionPipeline) -> list[Any]:
    """The pipeline's diffusion transformers; Wan2.2 has two."""
    return [pipe.components[name] for name in ("transformer", "transformer_2") if pipe.components.get(name) is not None]


def check_loras(loras: Iterable[str]) -> None:
    """See before a weight is loaded that LoRAs can be: PEFT is there, and each may be a file, a folder or on the Hub.

    Raises:
        DitAccelError: it is not, or none of these has such a name.
    """
    import importlib.util

    for lora in loras:
        if importlib.util.find_spec("peft") is None:
            raise DitAccelError("--lora needs PEFT, which is not installed: pip install 'dit_accel[lora]'.")
        if not Path(lora).expanduser().exists() and not is_hub_id(lora):
            raise DitAccelError(
                f"--lora {lora}: there is no such file or folder. Give a .safetensors file, the folder that holds "
                "pytorch_lora_weights.safetensors, or an id on the Hugging Face Hub (owner/name)."
            )


def _load_lora(pipe: DiffusionPipeline, lora: str, name: str) -> None:
    from safetensors import SafetensorError

    if not hasattr(pipe, "load_lora_weights"):
        raise DitAccelError(f"--lora: {type(pipe).__name__} takes no LoRA.")
    here = Path(lora).expanduser()
    try:
        pipe.load_lora_weights(str(here) if here.exists() else lora, adapter_name=name, use_safetensors=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: shapes of another model
        where = "" if here.exists() else "there is no such folder here, and from the Hugging Face Hub: "
        raise DitAccelError(
            f"--lora {lora} cannot be loaded into this {type(pipe).__name__}: {where}{first_line(error)}"
        ) from error


def call_arguments(
    pipe: DiffusionPipeline, own: Mapping[str, Any], given: Mapping[str, Any], extra: Iterable[str]
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call.

    Args:
        pipe: the pipeline.
        own: the model's defaults; those the pipeline does not take are left out.
        given: what options asked for, by argument; None where they did not.
        extra: ``key=value`` for any other argument, the value in JSON, or else plain text.

    Raises:
        DitAccelError: the pipeline has no such argument, needs one that was not given, or takes another kind of value,
            or a number is not finite.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if name not in takes:
            raise DitAccelError(f"{type(pipe).__name__} takes no {OPTIONS[name]}; leave it out.")
        if isinstance(value, float) and not math.isfinite(value):
            raise DitAccelError(f"{OPTIONS[name]} is a finite number, got {value}.")
    arguments = {name: value for name, value in own.items() if name in takes} | asked
    free = sorted(set(takes) - NOT_OPTIONS - set(OPTIONS))
    for item in extra:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise DitAccelError(f"--pipe takes key=value, such as max_sequence_length=256; got {item!r}.")
        if name in OPTIONS:
            raise DitAccelError(f"--pipe {name}: use {OPTIONS[name]}.")
        if name not in free:
            raise DitAccelError(
                f"{type(pipe).__name__} has no argument {name!r}.{did_you_mean(name, free)} It has: {', '.join(free)}."
            )
        arguments[name] = _value(pipe, takes[name], text)
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name != "self" and name not in arguments:
            raise DitAccelError(f"{type(pipe).__name__} needs {OPTIONS.get(name, f'--pipe {name}=...')}.")
    return arguments


def frame_rate(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> int | None:
    """The frames a second that a call is told, by an argument or its default; None if the pipeline asks for none."""
    takes = inspect.signature(type(pipe).__call__).parameters
    rates = [arguments.get(name, takes[name].default) for name in FRAME_RATES if name in takes]
    return next((round(rate) for rate in rates if isinstance(rate, int | float)), None)


def _value(pipe: DiffusionPipeline, parameter: inspect.Parameter, text: str) -> Any:
    """The value that a text stands for, as JSON or as it is, whichever is of the kind that the argument takes."""
    kind, name = _kind(pipe, parameter), parameter.name
    found: list[Any] = [text]
    with contextlib.suppress(json.JSONDecodeError):
        found.insert(0, json.loads(text, parse_constant=_refuse))
    for value in found:
        if (value is None and parameter.default is None) or _fits(value, kind):
            if name == LENGTH and value < 1:
                raise DitAccelError(f"--pipe {name} is a number of tokens of at least 1, got {value}.")
            return value
    raise DitAccelError(
        f"--pipe {name} of {type(pipe).__name__} is {inspect.formatannotation(kind)}, written in JSON; got {text!r}."
    )


def _kind(pipe: DiffusionPipeline, parameter: inspect.Parameter) -> Any:
    """What an argument of the call is annotated with; Any where that is nothing, or names what is not installed."""
    try:
        return typing.get_type_hints(type(pipe).__call__).get(parameter.name, Any)
    except NameError:
        return Any


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of an annotated kind."""
    parts = typing.get_args(kind)
    origin = typing.get_origin(kind) or kind
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list and parts:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is Any or not isinstance(origin, type):
        return True
    if isinstance(value, bool):
        return origin is bool
    return isinstance(value, (int, float) if origin is float else origin)


def _refuse(constant: str) -> None:
    raise DitAccelError(f"--pipe takes finite numbers, got {constant}.")


def warm_up(pipe: DiffusionPipeline, arguments: Mapping[str, Any], *, whole: bool) -> None:
    """Let lazy set-up happen before anything is timed: one denoising step, or the `whole` loop where it compiles."""
    steps = {} if whole else {"num_inference_steps": 1}
    pipe.set_progress_bar_config(disable=True)
    sampling.call(pipe, {**arguments, **steps}, seed=0)
