"""A saved accelerator: settings as JSON, learned weights as safetensors, and the models that they fit.

The ratios of a step cache's calibration file stand beside them, so that the folder can be moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dit_accel import values
from dit_accel.caches.ratios import MagRatios, mag_ratios, names_a_file
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, check_ours, read_json, replace_file
from dit_accel.kernels.impls import Impl
from dit_accel.setting import Setting

SETTINGS_FILE = "accelerator.json"
WEIGHTS_FILE = "accelerator.safetensors"
RATIOS_FILE = "accelerator_ratios.json"
FILES = (WEIGHTS_FILE, RATIOS_FILE, SETTINGS_FILE)
FORMAT = 2
KINDS: dict[str, Any] = {
    "setting": dict, "impl": str, "models": dict, "trained": dict | None, "weights_sha256": str | None,
    "ratios_sha256": str | None,
}  # fmt: skip
VERSION = importlib.import_module("dit_accel").__version__

Models = dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A saved accelerator, read and checked.

    Attributes:
        setting, impl: as in `Accelerator`.
        trained: what `lora.write` recorded of a fine-tuning; None without one.
        models: as in `identify`.
        weights: learned tensors by name; empty if the method has learned nothing.
    """

    setting: Setting
    impl: Impl
    trained: dict[str, Any] | None
    models: Models
    weights: dict[str, torch.Tensor]


def identify(transformers: Mapping[str, nn.Module]) -> Models:
    """Class and configuration hash of each transformer, by component name. Saved weights fit only these."""
    return {
        name: {"class": type(module).__name__, "config_hash": config_hash(module)}
        for name, module in transformers.items()
    }


def config_hash(module: nn.Module) -> str:
    """SHA-256 of a Diffusers model's configuration, without origin, version and how its weights are quantised."""
    config: Any = getattr(module, "config", {})
    settings = {
        key: value for key, value in dict(config).items() if not key.startswith("_") and key != "quantization_config"
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def save(
    path: str | pathlib.Path,
    setting: Setting,
    impl: Impl,
    models: Models,
    weights: Mapping[str, torch.Tensor],
    write_training: Callable[[pathlib.Path], dict[str, Any] | None],
) -> None:
    """Write an accelerator to the folder `path`. Complete files replace old ones, weights and ratios first.

    Args:
        setting, impl, models, weights: as in `Saved`.
        write_training: writes a fine-tuning to the folder and returns its record, or None without one.

    Raises:
        DitAccelError: the folder cannot be written, or the calibration file of the setting cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save as to_bytes

    folder = pathlib.Path(path)
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    content = to_bytes(stored, {"note": MARK}) if stored else None
    ratios = _calibration(setting)
    saved = {
        "note": MARK,
        "format": FORMAT,
        "dit_accel_version": VERSION,
        "setting": (setting if ratios is None else _with_ratios(setting, RATIOS_FILE)).as_dict(),
        "impl": impl,
        "models": models,
        "weights_sha256": None if content is None else hashlib.sha256(content).hexdigest(),
        "ratios_sha256": None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_ours((folder / name for name in FILES), "save_pretrained")
        saved["trained"] = write_training(folder)
        if content is not None:
            replace_file(folder / WEIGHTS_FILE, content)
        if ratios is not None:
            ratios.save(folder / RATIOS_FILE)
            saved["ratios_sha256"] = hashlib.sha256((folder / RATIOS_FILE).read_bytes()).hexdigest()
        replace_file(folder / SETTINGS_FILE, (json.dumps(saved, indent=2) + "\n").encode())
        if content is None:
            (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        if ratios is None:
            (folder / RATIOS_FILE).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # a full disk raises one or the other
        raise DitAccelError(f"Cannot save the accelerator to {folder}: {error}. Choose a writable folder.") from error


def read(path: str | pathlib.Path) -> Saved:
    """Read what `save` wrote.

    Raises:
        DitAccelError: `path` is no path, or a file is missing, damaged, of another format or edited, or the files do
            not belong together.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DitAccelError(f"load takes the folder that Accelerator.save_pretrained wrote; got {path!r}.")
    file = pathlib.Path(path) / SETTINGS_FILE
    content = read_json(file, "saved accelerator", "Save the accelerator again.", ("format", "models"))
    if content["format"] != FORMAT:
        raise DitAccelError(
            f"{file} has format {content['format']!r}, written by dit_accel {content.get('dit_accel_version')}; "
            f"dit_accel {VERSION} reads format {FORMAT}. Install the version that saved it."
        )
    odd = [key for key, kinds in KINDS.items() if not values.fits(content.get(key), kinds)] or _odd_entries(content)
    if odd:
        raise DitAccelError(
            f"{file} was changed: {odd[0]} cannot be {content.get(odd[0])!r}; save the accelerator again."
        )
    setting = _with_located_ratios(Setting.from_dict(content["setting"]), file.parent, content.get("ratios_sha256"))
    digest = content["weights_sha256"]
    weights = {} if digest is None else _read_weights(file.parent, digest)
    return Saved(setting, content["impl"], content["trained"], content["models"], weights)


def _calibration(setting: Setting) -> MagRatios | None:
    """The ratios of the calibration file that the setting's step cache names; None if it names none."""
    value = None if setting.cache is None else setting.cache.config.get("mag_ratios")
    return mag_ratios(value) if names_a_file(value) else None


def _with_ratios(setting: Setting, name: str) -> Setting:
    """The setting, whose step cache takes its ratios from the file of that name."""
    assert setting.cache is not None
    return setting.changed(cache=StepCache(setting.cache.name, {**setting.cache.config, "mag_ratios": name}))


def _with_located_ratios(setting: Setting, folder: pathlib.Path, digest: str | None) -> Setting:
    """The setting as `read` gives it: ratios that `save` wrote are found from every working directory."""
    if digest is None or setting.cache is None or setting.cache.config.get("mag_ratios") != RATIOS_FILE:
        return setting
    file = folder.absolute() / RATIOS_FILE
    _check_digest(file, _read_bytes(file, "ratios"), digest)
    return _with_ratios(setting, str(file))


def _odd_entries(content: Mapping[str, Any]) -> list[str]:
    """The entries whose keys are not those that `save` writes."""
    from dit_accel.checkpoint.lora import RECORD

    odd = [] if content["trained"] is None or content["trained"].keys() == RECORD else ["trained"]
    models = content["models"].values()
    fits = all(isinstance(model, dict) and model.keys() == {"class", "config_hash"} for model in models)
    return odd if fits else [*odd, "models"]


def check_identity(path: str | pathlib.Path, saved: Models, present: Models) -> None:
    """Refuse another model than the one that was saved."""
    if saved.keys() != present.keys():
        raise DitAccelError(
            f"{path} was saved for {', '.join(saved)}, but this model has {', '.join(present)}. Load it into the "
            "pipeline that it was saved from."
        )
    for name, model in saved.items():
        if model["class"] != present[name]["class"]:
            raise DitAccelError(
                f"{path} was saved for {name}: {model['class']}, but this model's is {present[name]['class']}. Load it "
                "into the model that it was saved from."
            )
        if model["config_hash"] != present[name]["config_hash"]:
            raise DitAccelError(
                f"{path} was saved for a {model['class']} with another configuration, such as its number of layers. "
                "Load it into the model that it was saved from."
            )


def load_weights(
    path: str | pathlib.Path, weights: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> None:
    """Give each module its learned weights."""
    wanted = {
        f"{name}.{key}": value.shape for name, module in modules.items() for key, value in module.state_dict().items()
    }
    present = {key: tensor.shape for key, tensor in weights.items()}
    if wanted != present:
        odd = sorted({*wanted.items()} ^ {*present.items()})[0][0]
        raise DitAccelError(
            f"The learned weights in {path} do not fit the accelerated layers: {odd} is missing on one side or has "
            "another shape. Save them again from the model that they belong to."
        )
    for name, module in modules.items():
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})


def _read_weights(folder: pathlib.Path, digest: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    file = folder / WEIGHTS_FILE
    content = _read_bytes(file, "learned weights")
    try:
        weights = from_bytes(content)
    except SafetensorError as error:
        raise DitAccelError(f"{file} is truncated or damaged ({error}). Copy or save it again.") from error
    _check_digest(file, content, digest)
    return weights


def _read_bytes(file: pathlib.Path, kind: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DitAccelError(f"The {kind} {file} cannot be read ({error}). Copy or save them again.") from error


def _check_digest(file: pathlib.Path, content: bytes, digest: str) -> None:
    """Refuse a file of another save than the record beside it."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise DitAccelError(f"{file} does not belong to the {SETTINGS_FILE} beside it. Copy or save both again.")
