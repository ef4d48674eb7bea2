"""What training adds to a model besides the method's own weights: a LoRA adapter, or new weights for the model.

Both stand beside the accelerator's files in Diffusers' formats: `pytorch_lora_weights.safetensors`, as
`load_lora_weights` takes it, or a `transformer/` folder, as `save_pretrained` writes it. The folder holds the whole
model, or the weights that differ from the base model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from dit_accel import values
from dit_accel.checkpoint import model_weights
from dit_accel.checkpoint.few_steps import Sampler
from dit_accel.checkpoint.model_weights import KNOWN_DTYPES, NewWeight, base_weights
from dit_accel.checkpoint.weight_files import open_weights
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, replace_file, staged

ADAPTER = "dit_accel"
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"  # where Diffusers looks for an adapter's rank and alpha
MODEL_FILES = "diffusion_pytorch_model{suffix}.safetensors"  # as Diffusers names them
SAMPLED = 16  # values of each tensor that enter a fingerprint


@dataclasses.dataclass(frozen=True)
class Trained(values.Checked):
    """What was trained, and from what.

    Args:
        model: name of the base model: embedded, a folder or a Hub id.
        revision: of the base model on the Hub.
        fingerprints: of the base model's transformers, by component name; see `fingerprint`.
        lora: whether there is a LoRA adapter, named `ADAPTER`.
        full: whether all weights of the transformer were trained.
        call: arguments of the pipeline's calls after training, such as the number of steps.
        changed: unless `full`, the names of the weights that differ from the base model's, by component.
        sampler: what samples the weights; None: the pipeline's own scheduler.
    """

    model: str
    revision: str | None
    fingerprints: Mapping[str, str]
    lora: bool = False
    full: bool = False
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sampler: Sampler | None = None


RECORD = {field.name for field in dataclasses.fields(Trained)} | {"lora_sha256"}  # the keys of what `write` returns


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the name, shape and 16 values, as bfloat16, of every weight except adapters.

    Float32 and bfloat16 copies of the same weights agree. A float16 copy may differ.

    Raises:
        DitAccelError: the weights are on the meta device or quantised.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(module), key=lambda item: item[0]):
        if weight.is_meta or weight.dtype not in KNOWN_DTYPES or type(weight.data) is not torch.Tensor:
            raise DitAccelError(
                f"The base model's weights cannot be compared: {name} is {weight.dtype} on {weight.device}. Load the "
                "fine-tuned accelerator before offloading, casting or quantising the model, or pass any_weights=True "
                "(--any-weights)."
            )
        flat = weight.detach().flatten()
        sampled = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def add_lora(transformer: nn.Module, targets: list[str], rank: int, alpha: float) -> None:
    """Give a Diffusers transformer a new LoRA adapter in float32, and freeze its other weights.

    Args:
        targets: dotted names of linear layers.
        rank, alpha: of PEFT's `LoraConfig`; B starts at zero, so nothing changes at first.

    Raises:
        DitAccelError: PEFT is not installed, or there is nothing to adapt.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise DitAccelError("LoRA needs PEFT, which is not installed: pip install 'dit_accel[lora]'.") from error
    if not targets:
        raise DitAccelError("LoRA found no linear layer to adapt; name some with targets.")
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    transformer.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    for name, weight in transformer.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()


def write(folder: pathlib.Path, trained: Trained, transformers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Write the trained weights to `folder`. Complete files replace old ones.

    Returns:
        The record that `apply` reads, in plain values.
    """
    from huggingface_hub import save_torch_state_dict

    record = dataclasses.asdict(trained) | {"lora_sha256": None}
    if trained.lora:
        content = _lora_file(transformers)
        replace_file(folder / LORA_FILE, content)
        record["lora_sha256"] = hashlib.sha256(content).hexdigest()
    for name, transformer in transformers.items() if trained.full or trained.changed else ():
        weights = {key: model_weights.plain(weight) for key, weight in base_weights(transformer)}
        if trained.full:
            stored = transformer.state_dict().keys()  # without buffers that are computed
            weights |= {key: buffer for key, buffer in transformer.named_buffers() if key in stored}
        else:
            weights = {key: weights[key] for key in trained.changed.get(name, ())}
        with staged(folder / name) as stage:
            transformer.save_config(stage / name)  # type: ignore[operator]
            save_torch_state_dict(weights, stage / name, filename_pattern=MODEL_FILES)
            config = stage / name / "config.json"
            marked = json.loads(config.read_text(encoding="utf-8")) | {"_note": MARK}  # Diffusers skips such names
            config.write_text(json.dumps(marked, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return record


def _lora_file(transformers: Mapping[str, nn.Module]) -> bytes:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, transformer in transformers.items():
        adapter = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
        tensors |= {f"{name}.{key}": tensor.detach().cpu().contiguous() for key, tensor in adapter.items()}
        settings = transformer.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, index]
        metadata |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    text = json.dumps(metadata, sort_keys=True, default=str)
    return _in_order(save(tensors, metadata={"format": "pt", "note": MARK, LORA_METADATA: text}))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order, which the library shuffles: equal weights make equal bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the format aligns the data
    return len(text).to_bytes(8, "little") + text + content[start:]


def apply(
    path: pathlib.Path, record: Mapping[str, Any], transformers: Mapping[str, nn.Module], *, any_weights: bool
) -> tuple[Trained, Callable[[], None]]:
    """Load what `write` wrote into the transformers.

    Args:
        record: what `write` returned.
        any_weights: accept other weights than those the training started from.

    Returns:
        What was trained, and a function that undoes the loading.

    Raises:
        DitAccelError: the record was edited, the base weights differ, the adapter's name is taken, or PEFT or a file is
            missing or damaged.
    """
    try:
        fields = {key: value for key, value in record.items() if key != "lora_sha256"}
        if fields.get("sampler") is not None:
            fields["sampler"] = values.build(Sampler, fields["sampler"], "sampler")
        trained = values.build(Trained, fields, "trained")
    except DitAccelError as error:
        raise DitAccelError(f"{path} was changed. Its fine-tuning: {error} Save the accelerator again.") from error
    for name, transformer in () if any_weights else transformers.items():
        if fingerprint(transformer) != trained.fingerprints.get(name):
            base = trained.model if trained.revision is None else f"{trained.model} ({trained.revision})"
            raise DitAccelError(
                f"{path} was trained from {base}, and this {name} has other weights of the same shape. Load it into "
                "that model, or pass any_weights=True (--any-weights) to try it on this one."
            )
    with contextlib.ExitStack() as undo:
        for name, module in transformers.items():
            if trained.lora:
                undo.callback(_load_lora(path, record["lora_sha256"], name, module))
            if trained.full or name in trained.changed:
                undo.callback(_load_model(path / name, module, None if trained.full else trained.changed[name]))
        return trained, undo.pop_all().close


def check_removable(trained: Trained, transformers: Mapping[str, nn.Module]) -> None:
    """Refuse to undo what `apply` loaded while offloading keeps the weights out of reach."""
    for name, transformer in transformers.items():
        if trained.full or name in trained.changed:
            model_weights.check_restorable(transformer)


def _load_lora(path: pathlib.Path, digest: str, name: str, transformer: nn.Module) -> Callable[[], None]:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise DitAccelError(f"{path} holds a LoRA, which needs PEFT: pip install 'dit_accel[lora]'.")
    file = path / LORA_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DitAccelError(f"The LoRA {file} cannot be read ({error.strerror}). Copy or save it again.") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DitAccelError(f"{file} is damaged or does not belong to the files beside it. Copy or save them again.")
    others = bool(present := getattr(transformer, "peft_config", {}))
    if ADAPTER in present:
        raise DitAccelError(f"The model already has a LoRA adapter named {ADAPTER!r}. Remove it first.")
    active = transformer.active_adapters() if others else []  # type: ignore[operator]
    transformer.load_lora_adapter(str(path), prefix=name, weight_name=LORA_FILE, adapter_name=ADAPTER)  # type: ignore[operator]
    if others:
        transformer.set_adapter([*active, ADAPTER])  # type: ignore[operator]  # set_adapters would reset their scales

    def unload() -> None:
        present = getattr(transformer, "peft_config", {})
        if not others and set(present) == {ADAPTER}:
            transformer.unload_lora()  # type: ignore[operator]
        elif others or ADAPTER in present:
            transformer.delete_adapters(ADAPTER)  # type: ignore[operator]

    return unload


def _load_model(folder: pathlib.Path, transformer: nn.Module, changed: Collection[str] | None) -> Callable[[], None]:
    """Replace all weights, or those that `changed` names, by those in a folder."""
    stored = open_weights(folder).models["transformer"].tensors
    shapes = {name: weight.shape for name, weight in base_weights(transformer)}
    wanted = shapes if changed is None else {name: shapes.get(name, torch.Size()) for name in changed}
    new = {name: NewWeight.of(tensor) for name, tensor in stored.items() if name in wanted}
    model_weights.check(folder, new, wanted, model_weights.every, where="the trained model")
    model_weights.check_replaceable(transformer)
    return model_weights.replace(transformer, new)
