"""Prepares a loaded pipeline for a generation: device, LoRAs, memory options, arguments of the call, warm-up."""

from __future__ import annotations

import contextlib
import inspect
import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import values
from dit_accel.errors import DitAccelError, first_line
from dit_accel.generation import modular, sampling
from dit_accel.generation.sources import is_hub_id
from dit_accel.registry import did_you_mean

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from dit_accel.generation.candidate import Candidate

# arguments of pipeline calls with their own option
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
TRUE_SCALE = "true_cfg_scale"  # of models whose guidance_scale is an input
GUIDED_ABOVE_0 = ("ZImage", "Krea2")  # pipelines that guide above 0, where others do above 1
NOT_OPTIONS = {"self", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}


def placement(device: str, dtype: str, offload: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of these names; "auto" chooses. Refuses missing devices, and offloading without a GPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # fails on "meta"
        chosen = torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise DitAccelError(f"--device {device} cannot be used here: {first_line(error)}") from error
    if offload != "none" and chosen.type == "cpu":
        raise DitAccelError(f"--offload {offload} moves weights between main memory and a GPU. Leave it out on a CPU.")
    if dtype == "auto":
        dtype = "bfloat16" if chosen.type == "cuda" else "float32"
    return chosen, getattr(torch, dtype)


def open_image(path: Path) -> Image:
    """Read the picture for image-to-video; refuse what is missing or no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise DitAccelError(f"--image {path} is not a picture that Pillow can read.") from error
    except OSError as error:
        raise DitAccelError(f"--image {path} cannot be read: {error.strerror or error}.") from error


def prepare(pipe: DiffusionPipeline, loras: Iterable[str], *, vae_tiling: bool, compile: bool) -> None:
    """Load LoRAs, enable tiling and compile the transformers' blocks; refuse what the pipeline cannot do."""
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
        from dit_accel.pipelines.targets import find_transformers

        for transformer, _ in find_transformers(pipe)[0].values():
            transformer.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]


def check_loras(loras: Iterable[str]) -> None:
    """Refuse LoRAs without PEFT, and names that are neither a file, nor a folder, nor an id on the Hub."""
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
    kind: type, defaults: Mapping[str, Any], options: Mapping[str, Any], extra: Iterable[str]
) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call, from the model's `defaults` that it takes, and options.

    `options` are by argument, None if absent; `extra` has ``key=value`` in JSON or plain text for any others.

    Raises:
        DitAccelError: the pipeline has no such argument, needs another one, or takes another kind of value.
    """
    named = {name: value for name, value in options.items() if value is not None}
    takes = parameters(kind, named)
    for name in named:
        if name not in takes:
            raise DitAccelError(f"{kind.__name__} takes no {OPTIONS[name]}; leave it out.")
    arguments = {name: value for name, value in defaults.items() if name in takes} | named
    free = sorted(set(takes) - NOT_OPTIONS - set(OPTIONS))
    for item in extra:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise DitAccelError(f"--pipe takes key=value, such as max_sequence_length=256; got {item!r}.")
        if name in OPTIONS:
            raise DitAccelError(f"--pipe {name}: use {OPTIONS[name]}.")
        if name not in free:
            raise DitAccelError(
                f"{kind.__name__} has no argument {name!r}.{did_you_mean(name, free)} It has: {', '.join(free)}."
            )
        arguments[name] = _value(kind, takes[name], text)
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name != "self" and name not in arguments:
            raise DitAccelError(f"{kind.__name__} needs {OPTIONS.get(name, f'--pipe {name}=...')}.")
    return arguments


def parameters(kind: type, inputs: Iterable[str]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline's call, annotated with types; `inputs` as in `modular.parameters`."""
    if modular.is_modular(kind):
        return modular.parameters(kind, inputs)
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError):  # an annotation may name a package that is not installed
        hints = typing.get_type_hints(kind.__call__)
    takes = inspect.signature(kind.__call__).parameters.items()
    return {name: parameter.replace(annotation=hints.get(name, Any)) for name, parameter in takes}


def default_of(kind: type, arguments: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these arguments that a call takes, given or default; None without any."""
    takes = parameters(kind, arguments)
    return next((arguments.get(name, takes[name].default) for name in names if name in takes), None)


def unguided(kind: type, arguments: Mapping[str, Any]) -> float | None:
    """The guidance scale of a call that ignores its negative prompt; None where the call uses it or has no scale.

    Some pipelines take two scales. Then `TRUE_SCALE` is that of the negative prompt.
    """
    scale = default_of(kind, arguments, TRUE_SCALE, "guidance_scale")
    least = 0 if kind.__name__.startswith(GUIDED_ABOVE_0) else 1
    return scale if isinstance(scale, int | float) and scale <= least else None


def _value(kind: type, parameter: inspect.Parameter, text: str) -> Any:
    """The value of a text: JSON or plain text, by the argument's type."""

    def refuse(constant: str) -> None:
        raise DitAccelError(f"--pipe takes finite numbers, got {constant}.")

    name, hint = parameter.name, parameter.annotation
    constants: list[Any] = [text]
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        constants.insert(0, json.loads(text, parse_constant=refuse))
    for value in constants:
        if (value is None and parameter.default is None) or values.fits(value, hint):
            if name == LENGTH and value < 1:
                raise DitAccelError(f"--pipe {name} is a number of tokens of at least 1, got {value}.")
            return value
    raise DitAccelError(
        f"--pipe {name} of {kind.__name__} is {inspect.formatannotation(hint)}, written in JSON; got {text!r}."
    )


def warm_up(pipe: DiffusionPipeline, arguments: Mapping[str, Any], candidate: Candidate, *, whole: bool) -> None:
    """Run one denoising step, or the `whole` loop to compile it, so that set-up is not timed.

    Where one step is refused the whole loop runs: a schedule may need both its ends, or guidance for each step.
    A method's one step runs without its dense steps and its step cache.
    """
    sampling.hide_bars(pipe)
    dense = candidate.setting is None
    with contextlib.nullcontext() if dense else (candidate if whole else candidate.without_dense_steps()).apply(pipe):
        if not whole:
            with contextlib.suppress(DitAccelError):
                sampling.call(pipe, {**arguments, "num_inference_steps": 1}, seed=0)
                return
        sampling.call(pipe, arguments, seed=0)
