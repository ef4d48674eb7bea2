"""What a training run writes: checkpoints (weights, their average, the optimizer's state), losses, samples.

Data order and noise follow from seed and step, so a checkpoint holds no random state. A resumed run gives the same bits
as an uninterrupted one. A checkpoint is a folder that gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dit_accel.errors import DitAccelError, first_line
from dit_accel.files import MARK, read_json, replace_file, staged
from dit_accel.generation import sampling
from dit_accel.generation.output import write_frames

PARTS = ("weights", "average", "optimizer")
SCALER = "loss scale"  # stored with the optimizer's state; no weight has this name
CHANGES = ("scale", "_growth_tracker")  # state of a loss scaler that changes from step to step
STATE = "state.json"
LOSSES = "losses.jsonl"
CHECKPOINTS = 2

Tensors = dict[str, torch.Tensor]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], scaler: torch.amp.GradScaler | None
) -> Tensors:
    """The state of the optimizer and of the loss scaler (fp16) as whole tensors, by names of weight and state."""
    tensors = {
        f"{name}.{key}": whole(value)
        for name, weight in weights.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    state = {} if scaler is None else scaler.state_dict()
    return tensors | {f"{SCALER}.{key}": torch.tensor(state[key], device="cpu") for key in CHANGES if key in state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    scaler: torch.amp.GradScaler | None,
    tensors: Tensors,
) -> None:
    """Load what `optimizer_tensors` returned."""
    for name, weight in weights.items():
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        optimizer.state[weight] = {
            key: like(value, weight) if value.shape == weight.shape else value for key, value in parts.items()
        }
    changed = {key: tensors[f"{SCALER}.{key}"].item() for key in CHANGES if f"{SCALER}.{key}" in tensors}
    if scaler is not None and changed:
        scaler.load_state_dict(scaler.state_dict() | changed)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor on the CPU. Parts in several processes are gathered, so all processes must call this."""
    values = tensor.detach()
    return (values.full_tensor() if isinstance(values, DTensor) else values).cpu().clone().contiguous()


def like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor on a weight's device, sharded over processes as the weight is."""
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements)
    return tensor.to(weight.device)


def save(folder: pathlib.Path, step: int, parts: Mapping[str, Tensors], record: Mapping[str, Any]) -> pathlib.Path:
    """Write a checkpoint, and delete all but the last `CHECKPOINTS`.

    Args:
        step: optimizer steps done.
        parts: tensors by part, of `PARTS`.
        record: values that a resumed run must share.

    Raises:
        DitAccelError: it cannot be written; earlier checkpoints stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder / f"step-{step:08d}"
    try:
        with staged(target) as stage:
            (stage / target.name).mkdir()
            for name in PARTS:
                save_file(parts[name], stage / target.name / f"{name}.safetensors", {"note": MARK})
            state = json.dumps({"note": MARK, "step": step, "record": record}, indent=1) + "\n"
            (stage / target.name / STATE).write_text(state, encoding="utf-8")
        for old in checkpoints_in(folder)[:-CHECKPOINTS]:
            for name in (STATE, *(f"{part}.safetensors" for part in PARTS)):
                (old / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody's file is in it
                old.rmdir()
    except (DitAccelError, OSError, SafetensorError) as error:  # a full disk raises any of them
        checkpoints = checkpoints_in(folder)
        raise DitAccelError(
            f"The checkpoint of step {step} cannot be written to {folder} ({first_line(error)}). "
            f"{f'The last good one is {checkpoints[-1]}' if checkpoints else 'There is no earlier one'}. Make room and "
            "run the same command again to resume."
        ) from error
    return target


def checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Complete checkpoints, the oldest first; a copy under another name is none."""
    named = (path.parent for path in folder.glob(f"step-*/{STATE}"))
    return sorted(path for path in named if re.fullmatch(r"step-\d{8,}", path.name))


def load(checkpoint: pathlib.Path) -> tuple[int, dict[str, Tensors], dict[str, Any]]:
    """Steps done, tensors by part and the record of a checkpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "Delete its folder to resume from the one before."
    content = read_json(checkpoint / STATE, "state of a checkpoint", remedy, ("step", "record"))
    step, record = content["step"], content["record"]
    if (
        type(step) is not int
        or step < 1
        or not isinstance(record, dict)
        or not isinstance(record.get("settings"), dict)
    ):
        raise DitAccelError(f"{checkpoint / STATE} is damaged: step {step!r}, record {record!r}. {remedy}")
    try:
        parts = {name: load_file(checkpoint / f"{name}.safetensors") for name in PARTS}
    except (OSError, ValueError, SafetensorError) as error:
        raise DitAccelError(f"The checkpoint {checkpoint} is damaged ({error}). {remedy}") from error
    return step, parts, record


def open_losses(path: pathlib.Path, step: int) -> TextIO:
    """Open `losses.jsonl` to add rows; each is in the file when its line is written.

    Args:
        step: of the checkpoint that the run resumes from; rows of later steps are dropped.
    """
    rows = [row for row in read_losses(path) if row["step"] <= step] if path.exists() else []
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode(), checked=True)
    return path.open("a", buffering=1, encoding="utf-8")


def read_losses(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a loss curve, without the incomplete last line that a killed process leaves.

    Raises:
        DitAccelError: the file cannot be read, or a line is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]
    except (OSError, ValueError, RecursionError) as error:
        raise DitAccelError(
            f"{path} is not a loss curve ({first_line(error)}). Move it, or restore its lines."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int or "loss" not in row:
            raise DitAccelError(
                f"{path}, line {number}, is not a row of a loss curve. Move the file, or restore the line."
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Validation:
    """Samples of a model in training, always with the same prompts and noise, to show what training changes.

    Args:
        prompts: one sample each; the i-th has the noise of seed i.
        arguments: of the pipeline's call: size, steps, guidance.
        fps: frames a second of the videos.
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    fps: int = 8

    def generate(self, pipe: DiffusionPipeline) -> list[np.ndarray]:
        """float32 [F, H, W, 3] in [0, 1] for each prompt; an image has one frame."""
        pipe.set_progress_bar_config(disable=True)
        samples = []
        for seed, prompt in enumerate(self.prompts):
            result = sampling.call(pipe, {"prompt": prompt, **self.arguments}, seed)
            samples.append(result.frames[0] if hasattr(result, "frames") else result.images[:1])
        return samples

    def write(self, folder: pathlib.Path, samples: list[np.ndarray]) -> None:
        """Write the samples as mp4 or png."""
        for index, frames in enumerate(samples):
            path = folder / f"{index:02d}{'.mp4' if len(frames) > 1 else '.png'}"
            with staged(path) as stage:
                write_frames(stage / path.name, (frames * 255).round().astype("uint8"), self.fps)
