"""The processes of a training run, as Hugging Face accelerate configured them."""

from __future__ import annotations

import pathlib
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.generation.processes import meet
from dit_accel.train.settings import TrainSettings


def join(settings: TrainSettings, output: pathlib.Path) -> Any:
    """Hugging Face's `Accelerator` for a run: it knows the other processes, and how they were configured.

    Args:
        settings: precision, accumulation and tracker are its business.
        output: folder of the run, where trackers write.

    Raises:
        DitAccelError: the tracker is not there, or they were configured in a way that training cannot follow.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedType

    installed = [tracker.value for tracker in get_available_trackers()]
    # Accelerate goes on without one that is not installed.
    if settings.tracker is not None and settings.tracker not in (*installed, *(["all"] if installed else [])):
        raise DitAccelError(
            f"The tracker {settings.tracker!r} is not installed, or unknown to accelerate. Installed: "
            f"{', '.join(installed) or 'none'}. Without one the losses are in losses.jsonl."
        )

    meet()
    # A loss on some attention outputs alone leaves the weights behind the last of them without a gradient.
    whole = {"flow", "teacher", "final", "consistency"} & settings.objectives.keys()
    hf = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        log_with=settings.tracker,
        project_dir=output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not whole)],
    )
    if hf.distributed_type == DistributedType.DEEPSPEED:
        raise DitAccelError(
            "DeepSpeed keeps its optimizer's state in a form that these checkpoints cannot hold; configure FSDP 2 "
            "(fsdp_version: 2) or plain data parallelism with `accelerate config`."
        )
    if hf.distributed_type == DistributedType.FSDP and not hf.is_fsdp2:
        raise DitAccelError("FSDP 1 flattens weights, which LoRA and checkpoints need by name; set fsdp_version: 2.")
    if settings.tracker is not None:
        hf.init_trackers("dit_accel", {key: str(value) for key, value in settings.as_dict().items()})
    return hf
