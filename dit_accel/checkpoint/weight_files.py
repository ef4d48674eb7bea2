"""Published weights as files: a safetensors file, a folder with one or several, or such a repository on the Hub.

Headers alone are read until a tensor is asked for. Pickles are refused: loading one can run any code.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_accel.errors import DitAccelError, first_line
from dit_accel.files import read_json

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
INDEX = ".safetensors.index.json"
MAIN = "diffusion_pytorch_model.safetensors"
PIPELINE_INDEX = "model_index.json"
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+\.safetensors))?(?:@(\S+))?")
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{0}', weights_only=True).items()}}, '{1}')\""
)
REFETCH = "Fetch it again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, by its header.

    Args:
        dtype: as safetensors names it: "BF16", "I8".
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as opened:
                return opened.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            raise DitAccelError(f"{self.key} of {self.file} cannot be read ({first_line(error)}). {REFETCH}") from error


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The weights of one transformer.

    Args:
        tensors: by their published names.
        metadata: of the files' headers.
        config: of `config.json` beside them; empty without one.
        files: that hold the tensors.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    def shape(self, ending: str) -> tuple[int, ...] | None:
        """Shape of the first tensor whose name ends so; None without one."""
        return next((stored.shape for key, stored in self.tensors.items() if key.endswith(ending)), None)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weights and the index that one path holds.

    Args:
        name: the user's name for it.
        models: by component of the pipeline: transformer, transformer_2.
        pipeline: the pipeline's index; empty without one.
    """

    name: str
    models: Mapping[str, StoredModel]
    pipeline: Mapping[str, Any]

    @property
    def first(self) -> StoredModel:
        """The weights of the first transformer."""
        return next(iter(self.models.values()))

    def all_have(self, pattern: str) -> bool:
        """Whether each transformer has a tensor whose name fits a regular expression as a whole."""
        return all(any(re.fullmatch(pattern, key) for key in model.tensors) for model in self.models.values())


def locate(path: str | os.PathLike[str], revision: str | None = None, option: str = "") -> Path:
    """The file or folder of that name; a repository on the Hub is fetched if this machine has none.

    Args:
        path: a file, a folder, or a repository as ``owner/name``, optionally with ``/file.safetensors`` and
            ``@revision``. JSON files, the transformers' weights and those beside the index are fetched.
        revision: branch, tag or commit of the repository.
        option: of the command line that names the path, for errors, such as "--load ".

    Raises:
        DitAccelError: there is no such file, folder or repository.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DitAccelError(f"load takes a file, a folder or a repository on the Hugging Face Hub; got {path!r}.")
    here, named = Path(path).expanduser(), HUB_NAME.fullmatch(str(path))
    if here.exists():
        if revision is not None:
            raise DitAccelError(f"A revision is for repositories on the Hub, and {path} is on this machine. Omit it.")
        return here
    if named is None:
        raise DitAccelError(
            f"{option}{path}: there is no such file or folder. Give one, or a repository on the Hugging Face Hub as "
            "owner/name, owner/name@revision or owner/name/file.safetensors."
        )
    repository, file, behind = named.groups()
    return _fetch(repository, file, revision or behind)


def _fetch(repository: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    wanted, offline = [] if file is None else [file], False
    try:
        try:
            if file is None:
                names = HfApi().list_repo_files(repository, revision=revision)
                wanted = _wanted(repository, names)
        except OfflineModeIsEnabled:
            offline = True  # what an earlier run has fetched
        patterns = None if offline else wanted
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline)
    except (OSError, HFValidationError) as error:
        raise DitAccelError(
            f"There is no folder {repository} here, and no repository of that name could be fetched from the Hugging "
            f"Face Hub ({first_line(error)}). Check the name, the network and, for gated weights, `hf auth login`."
        ) from error
    return Path(folder) if file is None else Path(folder, file)


def _wanted(repository: str, names: Sequence[str]) -> list[str]:
    """JSON files, the transformers' weights and those beside the index, without codecs and text encoders."""
    weights = [name for name in names if "/" not in name or name.startswith("transformer")]
    if not any(name.endswith(".safetensors") for name in weights):
        pickles = [name for name in weights if name.endswith(PICKLES)]
        if pickles:
            command = f"hf download {repository} {pickles[0]} --local-dir . && {_conversion(Path(pickles[0]))}"
            raise DitAccelError(f"{repository} holds only pickles, which can run any code. Convert it once: {command}")
    return [name for name in names if name.endswith(".json") or (name in weights and name.endswith(".safetensors"))]


def open_weights(path: Path, name: str | None = None) -> WeightFiles:
    """The weights in a file or folder; headers alone are read.

    Raises:
        DitAccelError: they are pickled, missing, incomplete or damaged, or several sets lie beside each other.
    """
    shown = str(path) if name is None else name
    if path.is_file():
        return WeightFiles(shown, {"transformer": _model(path.parent, [path])}, {})
    index = path / PIPELINE_INDEX
    pipeline = read_json(index, "pipeline's index", REFETCH) if index.is_file() else {}
    folders = {folder.name: folder for folder in sorted(path.glob("transformer*")) if folder.is_dir()}
    models = {
        component: _model(folder, files)
        for component, folder in (folders or {"transformer": path}).items()
        if (files := _weights_in(folder))
    }
    if not models:
        raise DitAccelError(
            f"{shown} holds no saved accelerator and no .safetensors file, nor does a folder transformer in it. "
            f"{REFETCH}"
        )
    return WeightFiles(shown, models, pipeline)


def _weights_in(folder: Path) -> list[Path]:
    """The files of one set of weights in a folder."""
    present = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) == 1:
        listed = read_json(indices[0], "index of weights", REFETCH, ["weight_map"])["weight_map"]
        files = sorted({folder / str(file) for file in listed.values()})
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise DitAccelError(f"{indices[0]} lists {lost[0]}, which is missing. {REFETCH}")
        return files
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if not present and pickles:
        _refuse_pickle(pickles[0])
    if folder / MAIN in present:
        return [folder / MAIN]
    shards = [match for file in present if (match := SHARD.fullmatch(file.name))]
    if shards and len(shards) == len(present) and len({(match[1], match[3]) for match in shards}) == 1:
        if len(shards) != int(shards[0][3]):
            raise DitAccelError(f"{folder} holds {len(shards)} of {int(shards[0][3])} parts of its weights. {REFETCH}")
    elif len(present) > 1:
        raise DitAccelError(
            f"{folder} holds several weights: {', '.join(file.name for file in present)}. Name one of these files."
        )
    return present


def _refuse_pickle(path: Path) -> None:
    raise DitAccelError(
        f"{path} is a pickle, and loading one can run any code. Convert it once, if you trust its source: "
        f"{_conversion(path)}"
    )


def _conversion(path: Path) -> str:
    """A command that writes a pickle's tensors as safetensors, without running its code."""
    return CONVERT.format(path, path.with_suffix(".safetensors"))


def _model(folder: Path, files: list[Path]) -> StoredModel:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix in PICKLES:
            _refuse_pickle(file)
        if file.suffix != ".safetensors":
            raise DitAccelError(f"{file} is not a .safetensors file. Name the file or folder that holds the weights.")
        try:
            with safe_open(file, "pt") as opened:  # which holds the header against the file's length
                metadata |= opened.metadata() or {}
                for key in opened.keys():
                    part = opened.get_slice(key)
                    stored = StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
                    if tensors.setdefault(key, stored) is not stored:
                        raise DitAccelError(f"{key} is in {tensors[key].file.name} and in {file.name}. {REFETCH}")
        except (OSError, SafetensorError) as error:
            raise DitAccelError(f"{file} is truncated or damaged ({first_line(error)}). {REFETCH}") from error
    for index in folder.glob(f"*{INDEX}") if len(files) > 1 else ():
        listed = read_json(index, "index of weights", REFETCH, ["weight_map"])["weight_map"]
        if odd := sorted(listed.keys() ^ tensors.keys()):
            raise DitAccelError(f"{index} and its files differ: {odd[0]} is in only one of them. {REFETCH}")
    config = folder / "config.json"
    settings = read_json(config, "model's configuration", REFETCH) if config.is_file() else {}
    return StoredModel(tensors, metadata, settings, tuple(files))
