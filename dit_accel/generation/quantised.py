"""Quantised transformers: what `--quantize` names, and what Diffusers' loader is given for it.

torchao quantises the transformers of a model as they are loaded. A GGUF file holds one transformer, quantised already.
Attention runs on queries, keys and values, which quantised layers return in the dtype of the call.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel import registry
from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    import torch

    from dit_accel.generation.sources import Source

TORCHAO = {  # its configuration classes, by the name of the choice
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
    "fp8-dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
GGUF = "gguf:"
FORM = f"{'|'.join(TORCHAO)}|{GGUF}FILE[,FILE]"
FP8_SINCE = (8, 9)  # compute capability of the first GPUs that multiply in fp8: Ada
MAGIC = b"GGUF"  # the first bytes of such a file


def gguf_files(text: str | None) -> list[Path]:
    """The files that a choice names, in the order of the transformers; none for torchao."""
    names = text.removeprefix(GGUF).split(",") if text is not None and text.startswith(GGUF) else []
    return [Path(name).expanduser() for name in names]


def transformers(source: Source) -> list[str]:
    """The components that a choice quantises: the diffusion transformers, in the order of the model's index."""
    names = [(name, source.component_class(name)) for name in source.index]
    return [name for name, kind in names if kind is not None and registry.family_of([kind]) is not None]


def check(text: str | None, source: Source, device: torch.device) -> None:
    """Check all of a choice that can be checked without weights.

    Raises:
        DitAccelError: there is no such choice, its package or a file is missing, the device cannot run it, or the
            model's weights are quantised already.
    """
    if text is None:
        return
    names, files = transformers(source), gguf_files(text)
    if text not in TORCHAO and not files:
        raise DitAccelError(f"--quantize is {FORM}; got {text!r}.")
    package = "gguf" if files else "torchao"
    if find_spec(package) is None:
        raise DitAccelError(f"--quantize {text} needs {package}: pip install 'dit_accel[quantize]'.")
    if quantised := [name for name in names if "quantization_config" in source.config(name)]:
        raise DitAccelError(f"{source.model} holds a quantised {quantised[0]} already. Leave out --quantize.")
    if text == "fp8-dynamic":
        _check_fp8(device)
    if files and len(files) != len(names):
        raise DitAccelError(
            f"--quantize {GGUF} takes a file for each transformer, and {source.model} has {', '.join(names)}; got "
            f"{len(files)} files."
        )
    for file in files:
        try:
            with file.open("rb") as opened:
                start = opened.read(len(MAGIC))
        except OSError as error:
            raise DitAccelError(f"--quantize: {file} cannot be read: {error.strerror or error}.") from error
        if start != MAGIC:
            raise DitAccelError(
                f"--quantize: {file} is damaged, or not a GGUF file. Give the .gguf file of a transformer."
            )


def _check_fp8(device: torch.device) -> None:
    import torch

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < FP8_SINCE:
        raise DitAccelError(
            "--quantize fp8-dynamic multiplies in fp8, which NVIDIA GPUs from compute capability 8.9 on do; got "
            f"{device.type if capability is None else '.'.join(map(str, capability))}. Choose fp8, which stores "
            "weights alone."
        )


def check_trainable(source: Source) -> None:
    """Refuse a quantised base model: training compares, saves and may change its weights."""
    for name in transformers(source):
        if "quantization_config" in source.config(name):
            raise DitAccelError(
                f"{source.model} holds a quantised {name}, which train does not take. Train on the model's own "
                "weights, and use the result with --quantize."
            )


def loading(text: str | None, source: Source, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Diffusers' configurations by component that torchao quantises, and transformers that were read from GGUF files.

    A choice that passed `check`; errors are Diffusers' own.
    """
    if text is None:
        return {}, {}
    import diffusers

    names = transformers(source)
    if text in TORCHAO:
        from torchao import quantization

        kind = getattr(quantization, TORCHAO[text])
        return {name: diffusers.TorchAoConfig(kind()) for name in names}, {}
    models = {}
    for name, file in zip(names, gguf_files(text), strict=True):
        kind = getattr(diffusers, source.component_class(name) or "")
        config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        where = {"config": str(source.folder), "subfolder": name}
        models[name] = kind.from_single_file(str(file), quantization_config=config, dtype=dtype, **where)
    return {}, models
