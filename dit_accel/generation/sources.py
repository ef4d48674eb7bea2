"""Sources of models: embedded, a folder or the Hub. Their JSON files are read before any weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dit_accel import registry
from dit_accel.errors import DitAccelError, first_line
from dit_accel.files import read_json
from dit_accel.generation import modular, quantised
from dit_accel.pipelines.quiet import quietly
from dit_accel.pipelines.refused import refusal

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.pipelines.family import Family
    from dit_accel.pipelines.sizes import Sizes

EMBEDDED = ("demo",)
INDEX = "model_index.json"
REFETCH = "Fetch the file again."
# Pipelines that published indices name and Diffusers lacks, with the stock one of the same components.
STOCK_PIPELINES = {"WanDMDPipeline": "WanPipeline", "WanImageToVideoDmdPipeline": "WanImageToVideoPipeline"}
FLOAT32_CODECS = ("AutoencoderKLWan",)  # its published recipe: 16 bits cause bands and blotches


@dataclasses.dataclass(frozen=True)
class Source:
    """A pipeline in Diffusers' format, modular or not. What its files lack or nothing here supports is refused.

    Args:
        model: the user's name for it.
        folder: with the pipeline's JSON files at least.
    """

    model: str
    kind: Literal["embedded", "folder", "hub"]
    folder: Path
    revision: str | None = None

    @property
    def index(self) -> dict[str, Any]:
        """The index: the pipeline's class, and library and class of each component."""
        return read_json(self.folder / (modular.INDEX if self.modular else INDEX), "model's index", REFETCH)

    @property
    def modular(self) -> bool:
        """Whether it is a modular pipeline, and no other."""
        return not (self.folder / INDEX).is_file()

    def component_class(self, component: str) -> str | None:
        """The name of a component's class; None without such a component."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) in (2, 3) else None

    def config(self, component: str) -> dict[str, Any]:
        """The component's own settings, from its `config.json`; a modular pipeline may name another repository."""
        path = self.folder / component / "config.json"
        entry = self.index.get(component)
        if not path.is_file() and isinstance(entry, list) and len(entry) == 3:
            place = entry[2]
            elsewhere = place.get("pretrained_model_name_or_path") or ""
            if is_hub_id(elsewhere):
                path = _fetch_json(elsewhere, place.get("revision")) / (place.get("subfolder") or "") / "config.json"
        return read_json(path, f"configuration of {component}", REFETCH)

    def pipeline_class(self) -> type:
        """The pipeline's class in Diffusers, where this version has it."""
        import diffusers

        name = self.index.get("_class_name")
        name = STOCK_PIPELINES.get(name, name) if isinstance(name, str) else name
        kind = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type):
            raise DitAccelError(f"{self.model} is a {name}, which diffusers {diffusers.__version__} does not have.")
        return kind

    def family(self) -> Family:
        """The family of the transformer, where it has one."""
        name = self.component_class("transformer")
        if name is None:
            raise DitAccelError(f"{self.model} has no transformer. Only diffusion transformers can be accelerated.")
        family = registry.family_of([name])
        if family is None:
            raise DitAccelError(f"{self.model} has a {name}, which is not supported: {refusal([name])}")
        return family

    def sizes(self) -> Sizes:
        """The sizes that the model can make."""
        try:
            return self.family().sizes(self.config("transformer"), self.config("vae"))
        except KeyError as missing:
            raise DitAccelError(
                f"The configuration of {self.model} lacks {missing}, which decides the size of a token. Save the "
                "pipeline again with save_pretrained, or use --grid if the command has it."
            ) from missing

    def call_defaults(self) -> dict[str, Any]:
        """The model's own defaults of the pipeline's call."""
        from dit_accel.pipelines.demo import DEFAULTS

        return DEFAULTS.call() if self.kind == "embedded" else {}

    @property
    def fps(self) -> int:
        """Frames a second by default."""
        from dit_accel.pipelines.demo import DEFAULTS

        return DEFAULTS.fps if self.kind == "embedded" else self.sizes().fps


def find(model: str, revision: str | None = None) -> Source:
    """Find a model and its JSON files, and fetch only these from the Hub.

    Raises:
        DitAccelError: there is no such model, or it is not a pipeline in Diffusers' format.
    """
    folder = Path(model).expanduser()
    if not model.strip():
        raise DitAccelError(f"--model is {' or '.join(EMBEDDED)}, a folder or an id on the Hugging Face Hub; got none.")
    if revision is not None and (model in EMBEDDED or folder.is_dir()):
        raise DitAccelError(f"--revision is for models on the Hub, and {model} is on this machine. Leave it out.")
    if model in EMBEDDED:
        from dit_accel.pipelines import demo

        return Source(model, "embedded", demo.WEIGHTS)
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
    if not any((source.folder / index).is_file() for index in (INDEX, modular.INDEX)):
        raise DitAccelError(
            f"{model} holds no {INDEX} (nor {modular.INDEX}), so it is not a pipeline in Diffusers' format. "
            "Convert single-file checkpoints and bare transformers first (save_pretrained of the whole pipeline)."
        )
    return source


def is_hub_id(model: str) -> bool:
    """Whether a name has the form owner/name of the Hugging Face Hub."""
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


def load(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    offload: str = "none",
    inputs: Iterable[str] = ("prompt",),
    quantize: str | None = None,
) -> DiffusionPipeline:
    """Load the pipeline from safetensors only, and run no code of the model; Wan's codec stays in float32.

    Offloading "model" and "group" move components or layers to the device when they run. `inputs` names arguments of
    the calls to come; of a modular pipeline, only the components that they need are loaded. `quantize` is a
    choice that `quantised.check` passed; a GGUF file stands in for a transformer's safetensors.

    Raises:
        DitAccelError: weights are missing, damaged or in another format, or the device has too little memory.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    for path in () if source.kind == "hub" else sorted(source.folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, "pt"):  # reads the header, which states the file's length
                pass
        except SafetensorError as error:
            raise DitAccelError(f"{path} is damaged or cut short ({first_line(error)}). Fetch it again.") from error
    try:
        with quietly():
            pipe = _load(source, dtype, inputs, device if offload == "model" else None, quantize)
            if offload != "model" or not source.modular:
                pipe.to(device if offload == "none" else "cpu")
    except torch.OutOfMemoryError as error:
        hint = "Try --offload model or --offload group."
        raise DitAccelError(f"{source.model} does not fit on {device}. {hint}") from error
    except (OSError, ValueError, SafetensorError) as error:  # Diffusers raises ValueError for a faulty model
        raise DitAccelError(f"Cannot load {source.model}: {first_line(error)}") from error
    if offload == "model" and not source.modular:
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        from diffusers.hooks import apply_group_offloading

        if source.modular:  # which has no method for it
            models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
            enable = [functools.partial(apply_group_offloading, model) for model in models]
        else:
            enable = [pipe.enable_group_offload]
        where = {"onload_device": device, "offload_device": torch.device("cpu")}
        for start in enable:
            start(**where, offload_type="leaf_level", use_stream=device.type == "cuda")
    return pipe


def _load(
    source: Source, dtype: torch.dtype, inputs: Iterable[str], offload_to: torch.device | None, quantize: str | None
) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    configs, parts = quantised.loading(quantize, source, dtype)
    if configs and not source.modular:
        parts["quantization_config"] = PipelineQuantizationConfig(quant_mapping=configs)
    if source.kind == "embedded":
        from dit_accel.pipelines import demo

        return demo.load_demo(dtype=dtype, folder=source.folder, **parts)
    if source.index.get("vae", [None])[0] == "dit_accel.pipelines.demo.codec":  # a saved copy of the embedded model
        from dit_accel.pipelines.demo import codec  # noqa: F401  Diffusers wants it imported
    dtypes = {"default": dtype}
    if source.component_class("vae") in FLOAT32_CODECS:
        dtypes["vae"] = torch.float32
    where = source.model if source.kind == "hub" else str(source.folder)
    if source.modular:
        return modular.load(where, source.revision, dtypes, inputs, offload_to, configs, parts)
    known = parts or source.index.get("_class_name") in STOCK_PIPELINES  # DiffusionPipeline itself would drop the parts
    kind: Any = source.pipeline_class() if known else DiffusionPipeline
    return kind.from_pretrained(
        where, revision=source.revision, dtype=dtypes, use_safetensors=True, trust_remote_code=False, **parts
    )
