"""Where a model comes from: embedded, a folder or the Hub; its JSON files are read before any weight is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

EMBEDDED = ("demo",)
INDEX = "model_index.json"
WAN_FPS = 16  # what Wan was trained on
FLOAT32_CODECS = ("AutoencoderKLWan",)  # its published recipe: bands and blotches appear in 16 bits


@dataclasses.dataclass(frozen=True)
class Source:
    """A pipeline in Diffusers' format.

    Args:
        model: what the user called it.
        kind: whether it is embedded, a local folder or on the Hub.
        folder: holds at least the pipeline's JSON files.
        revision: of a model on the Hub.
    """

    model: str
    kind: Literal["embedded", "folder", "hub"]
    folder: Path
    revision: str | None = None

    @property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` says: the pipeline's class, and library and class of each component."""
        return read_json(self.folder / INDEX)

    def component_class(self, component: str) -> str | None:
        """The name of a component's class, or None where the pipeline has no such component."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def config(self, component: str) -> dict[str, Any]:
        """The component's own settings, from its `config.json`."""
        return read_json(self.folder / component / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        DitAccelError: the file is missing, cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DitAccelError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise DitAccelError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise DitAccelError(f"{path} should hold a JSON object, it holds a {type(value).__name__}.")
    return value


def find(model: str, revision: str | None = None) -> Source:
    """Find a model and have its JSON files at hand; of a model on the Hub only these are fetched.

    Raises:
        DitAccelError: there is no such model, or it is not a pipeline in Diffusers' format.
    """
    if revision is not None and (model in EMBEDDED or Path(model).expanduser().is_dir()):
        raise DitAccelError(f"--revision is for models on the Hub, and {model} is on this machine; leave it out.")
    if model in EMBEDDED:
        from dit_accel.pipelines import demo

        return Source(model, "embedded", demo.WEIGHTS)
    folder = Path(model).expanduser()
    if folder.is_dir():
        source = Source(model, "folder", folder)
    elif folder.exists():
        raise DitAccelError(f"--model {model} is a file; give the folder that holds {INDEX}.")
    elif not is_hub_id(model):
        raise DitAccelError(
            f"There is no model folder {model}. Give {' or '.join(EMBEDDED)}, a folder that holds {INDEX}, "
            "or an id on the Hugging Face Hub (owner/name)."
        )
    else:
        source = Source(model, "hub", _fetch_json(model, revision), revision)
    if not (source.folder / INDEX).is_file():
        raise DitAccelError(
            f"{model} holds no {INDEX}, so it is not a pipeline in Diffusers' format. Single-file checkpoints and "
            "bare transformers have to be converted first (save_pretrained of the whole pipeline)."
        )
    return source


def is_hub_id(model: str) -> bool:
    """Whether a name has the form owner/name, so that it may be one on the Hugging Face Hub."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


def _fetch_json(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*/config.json"]))
    except (OSError, HFValidationError) as error:
        raise DitAccelError(
            f"There is no folder {model} here, and no model of that name could be fetched from the Hugging Face Hub "
            f"({first_line(error)}). Check the name, the network and, for a gated model, `hf auth login`."
        ) from error


def load(source: Source, dtype: torch.dtype, device: torch.device, offload: str = "none") -> DiffusionPipeline:
    """Load the pipeline; weights come from safetensors only, and no code that comes with a model is run.

    Args:
        source: from `find`.
        dtype: of the weights; Wan's codec stays in float32.
        device: where it is to run.
        offload: "none" keeps it there whole; "model" and "group" move components or layers there when they run.

    Raises:
        DitAccelError: weights are missing, damaged or in another format, or the device has too little memory.
    """
    import torch
    from safetensors import SafetensorError

    if source.kind != "hub":
        _check_weights(source.folder)
    staging = device if offload == "none" else torch.device("cpu")
    try:
        with quietly():
            pipe = _load(source, dtype).to(staging)
    except torch.OutOfMemoryError as error:
        raise DitAccelError(
            f"{source.model} does not fit on {device}; try --offload model or --offload group."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: what Diffusers finds wrong with a model
        raise DitAccelError(f"Cannot load {source.model}: {first_line(error)}") from error
    _offload(pipe, device, offload)
    return pipe


def _check_weights(folder: Path) -> None:
    """Read the header of every weight file, which tells how long the file should be."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise DitAccelError(f"{path} is damaged or cut short ({first_line(error)}); fetch it again.") from error


def _load(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline

    if source.kind == "embedded":
        from dit_accel.pipelines import demo

        return demo.load_demo(dtype=dtype, folder=source.folder)
    dtypes = {"default": dtype}
    if source.component_class("vae") in FLOAT32_CODECS:
        dtypes["vae"] = torch.float32
    where = source.model if source.kind == "hub" else str(source.folder)
    return DiffusionPipeline.from_pretrained(
        where, revision=source.revision, dtype=dtypes, use_safetensors=True, trust_remote_code=False
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and remarks of loading, so that what goes wrong stands alone; errors are raised, and
    what is said of them besides would be a second line."""
    import logging

    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(level)


def _offload(pipe: DiffusionPipeline, device: torch.device, offload: str) -> None:
    import torch

    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )


def call_defaults(source: Source) -> dict[str, Any]:
    """The model's own arguments of the pipeline's call, where it has some that differ from the pipeline's."""
    if source.kind != "embedded":
        return {}
    from dit_accel.pipelines import demo

    return demo.DEFAULTS.call()


def frames_a_second(source: Source) -> int:
    """The frame rate where the pipeline asks for none: the embedded model's own, Wan's for all others."""
    if source.kind != "embedded":
        return WAN_FPS
    from dit_accel.pipelines import demo

    return demo.DEFAULTS.fps


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
