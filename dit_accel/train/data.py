"""Training data: latents and the other arguments of a transformer's call, in safetensors shards.

A data folder holds `dataset.json` and shards; `prepare.py` makes it. A sample is its clean latents and the conditioning
of the transformer call (prompt embeddings, position ids, guidance), exactly as the pipeline passes them. So training
needs neither codec nor text encoder, and nothing depends on the model family.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.files import MARK, read_json, replace_file
from dit_accel.train.settings import INDEX

FORMAT = 1
SHARD_BYTES = 512 * 2**20

Call = dict[str, Any]


@dataclasses.dataclass
class TrainingSample:
    """One sample, or a batch of them.

    Args:
        latents: float32 [1, ...] (a batch: [B, ...]), noise-free, as the transformer takes them.
        call: the other arguments of the transformer's call; some tensors have one row a sample.
        prompt: the caption; of a batch, all captions.
    """

    latents: torch.Tensor
    call: Call
    prompt: Any

    @property
    def kind(self) -> str:
        """Samples of one kind can be batched: tensors with a row a sample agree in shape, and all else is equal."""
        digest = hashlib.sha256(repr(tuple(self.latents.shape)).encode())
        for name, value in sorted(self.call.items()):
            tensor = isinstance(value, torch.Tensor)
            digest.update(repr((name, (tuple(value.shape), value.dtype) if tensor else value)).encode())
            if tensor and not is_row(value):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def is_row(value: Any) -> bool:
    """Whether a value of one sample's call is a tensor with one row."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 1


def collate(samples: list[TrainingSample]) -> TrainingSample:
    """Samples of one kind as a batch; what has no row a sample, such as position ids, comes from the first."""
    first = samples[0]
    call = {
        name: torch.cat([sample.call[name] for sample in samples]) if is_row(value) else value
        for name, value in first.call.items()
    }
    latents = torch.cat([sample.latents for sample in samples])
    return TrainingSample(latents, call, [sample.prompt for sample in samples])


def write(folder: pathlib.Path, samples: Iterable[TrainingSample], negative: Call, about: Mapping[str, Any]) -> int:
    """Write a data folder and return the number of samples. `dataset.json` comes last, so a folder with it is complete.

    Args:
        folder: made if missing.
        samples: of one row each.
        negative: conditioning of the empty prompt, for distillation with guidance.
        about: how the data was made, for the model card.

    Raises:
        DitAccelError: there are no samples, or the folder cannot be written.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    shards = 0
    for sample in samples:
        varying, constants = _split(sample.call)
        key = str(len(rows))
        tensors |= {f"{key}.latents": sample.latents} | {f"{key}.{name}": value for name, value in varying.items()}
        rows.append({"shard": shards, "kind": sample.kind, "prompt": sample.prompt, "constants": constants})
        if sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_BYTES:
            _write_tensors(folder / _shard_name(shards), tensors)
            tensors, shards = {}, shards + 1
    if not rows:
        raise DitAccelError("There is no training data: the source has no samples. Give captioned files or prompts.")
    if tensors:
        _write_tensors(folder / _shard_name(shards), tensors)
    varying, constants = _split(negative)
    _write_tensors(folder / "negative.safetensors", varying)
    index = {"note": MARK, "format": FORMAT, "about": dict(about), "negative": constants, "samples": rows}
    replace_file(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return len(rows)


class Dataset:
    """A data folder, read sample by sample.

    Attributes:
        about: how it was made.
        negative: conditioning of the empty prompt.

    Raises:
        DitAccelError: the folder holds no complete data set.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        remedy = "Prepare training data with `dit-accel train --prepare`."
        index = read_json(folder / INDEX, "index of training data", remedy, ("format", "about", "samples", "negative"))
        if index["format"] != FORMAT or not index["samples"]:
            raise DitAccelError(f"{folder / INDEX} is not a data set of format {FORMAT} with samples. {remedy}")
        self.about: dict[str, Any] = index["about"]
        self._rows: list[dict[str, Any]] = index["samples"]
        self.negative: Call = index["negative"] | self._tensors("negative.safetensors", "")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingSample:
        row = self._rows[index]
        tensors = self._tensors(_shard_name(row["shard"]), f"{index}.")
        return TrainingSample(tensors.pop("latents").float(), row["constants"] | tensors, row["prompt"])

    def kinds(self) -> list[str]:
        """`TrainingSample.kind` of all samples, in order."""
        return [row["kind"] for row in self._rows]

    def _tensors(self, name: str, prefix: str) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / name, "pt") as file:
                return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        except (OSError, SafetensorError) as error:
            file = self.folder / name
            raise DitAccelError(f"{file} is missing or damaged ({error}). Prepare the data again.") from error


class Order:
    """The samples of each micro-batch: a function of seed and position alone, so a run can resume anywhere.

    Every epoch is a new permutation, in which the samples of each kind are cut into batches. An epoch leaves out the
    rest of a kind. A kind with fewer samples than a batch (of one process) is repeated to fill one.
    """

    def __init__(self, kinds: list[str], batch: int, seed: int) -> None:
        self._batch, self._seed = batch, seed
        self._groups = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
        self.batches = sum(max(1, len(group) // batch) for group in self._groups)
        self._epochs: dict[int, list[list[int]]] = {}

    def __getitem__(self, position: int) -> list[int]:
        """Sample indices of micro-batch `position`, counted from the start of training."""
        epoch, index = divmod(position, self.batches)
        if epoch not in self._epochs:
            self._epochs = {epoch: list(self._permutation(epoch))}
        return self._epochs[epoch][index]

    def _permutation(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        batches: list[list[int]] = []
        for group in self._groups:
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            while len(order) < self._batch:
                order += group
            batches += [order[i * self._batch :][: self._batch] for i in range(max(1, len(group) // self._batch))]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _split(call: Call) -> tuple[dict[str, torch.Tensor], Call]:
    """The tensors of a call, and its other arguments, which must be plain JSON values."""
    values = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    constants = {name: value for name, value in call.items() if name not in tensors}
    try:
        plain = json.loads(json.dumps(constants))
    except TypeError as error:
        raise DitAccelError(f"The transformer's call cannot be stored: {error}.") from error
    return tensors, plain


def _shard_name(index: int) -> str:
    return f"{index:05d}.safetensors"


def _write_tensors(file: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    replace_file(file, save({name: value.contiguous() for name, value in tensors.items()}, {"note": MARK}))
