"""The processes of a training run, as Hugging Face accelerate configured them."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.files import hold
from dit_accel.generation.processes import meet
from dit_accel.train.settings import TrainSettings

if TYPE_CHECKING:
    import torch


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed; accelerate would train without it."""
    from accelerate.tracking import get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    if name is not None and name not in (*installed, *(["all"] if installed else [])):
        raise DitAccelError(
            f"The tracker {name!r} is not installed, or unknown to accelerate. Installed: "
            f"{', '.join(installed) or 'none'}. Choose one of them, or none: losses.jsonl has the losses."
        )


@contextlib.contextmanager
def reserved(output: pathlib.Path, main: bool) -> Iterator[None]:
    """Keep other runs out of the output folder during the block; the `main` process does it for all of a run."""
    with hold(output) if main else contextlib.nullcontext() as locked:
        if locked is False:
            print(f"{output} has no locks; start no other training into it.", file=sys.stderr)
        yield


def mixed_precision(precision: str, device: torch.device) -> str:
    """The precision of a run on `device`: "auto" is "bf16" where it has instructions for that, and else "no".

    PyTorch also computes bf16 on other processors, but converts at every operation: training takes several times as
    long as in float32.
    """
    import torch

    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native else "no"


def join(settings: TrainSettings, output: pathlib.Path) -> Any:
    """Hugging Face's `Accelerator` for a run, whose trackers write to `output`; what cannot be held is refused."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DistributedType, parse_flag_from_env

    check_tracker(settings.tracker)
    device = meet().device
    # a loss on attention outputs alone gives weights behind the last recorded layer no gradient
    whole = {"flow", "teacher", "final", "consistency"} & settings.objectives.keys()
    hf = Accelerator(
        mixed_precision=mixed_precision(settings.precision, device),
        gradient_accumulation_steps=settings.accumulation,
        log_with=settings.tracker,
        project_dir=output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not whole)],
    )
    if hf.distributed_type == DistributedType.DEEPSPEED:
        raise DitAccelError(
            "The checkpoints cannot hold DeepSpeed's optimizer state. Configure FSDP 2 (fsdp_version: 2) or plain data "
            "parallelism with `accelerate config`."
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and hf.distributed_type != DistributedType.FSDP:
        raise DitAccelError(
            f"accelerate shards weights (FSDP) only on several GPUs, and would train {hf.num_processes} processes on "
            f"{hf.device.type} without it. Leave FSDP out of the configuration."
        )
    if hf.distributed_type == DistributedType.FSDP and not hf.is_fsdp2:
        raise DitAccelError("FSDP 1 flattens weights, which LoRA and checkpoints need by name. Set fsdp_version: 2.")
    if settings.tracker is not None:
        hf.init_trackers("dit_accel", {key: str(value) for key, value in dataclasses.asdict(settings).items()})
    return hf


class StopSignal:
    """With `hold`, delays SIGINT and SIGTERM during a with block, so a training step ends before they take effect."""

    def __init__(self, *, hold: bool) -> None:
        self._hold = hold and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._number: int | None = None

    @property
    def signalled(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    def follow(self) -> None:
        """Let a signal that has come take effect, and raise KeyboardInterrupt."""
        if self._number is not None:
            if callable(handler := self._before[self._number]):
                handler(self._number, None)
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM) if self._hold else ():
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signalled:  # the second one does not wait
            raise KeyboardInterrupt
        self._number = number
