"""This process among those that `accelerate launch` or `torchrun` started: which part of a list of work is its own."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PATIENCE = datetime.timedelta(days=7)  # with another that has more left to do; torch gives up after ten minutes on GPUs


@dataclasses.dataclass(frozen=True)
class ProcessRank:
    """The place of a process among others, with which it need not talk.

    Args:
        index, count: its place among all of them.
        local: its place on this machine, which is the GPU it has there.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> ProcessRank:
        """This process, as the launcher's environment variables say; alone without them.

        Raises:
            DitAccelError: RANK, WORLD_SIZE or LOCAL_RANK does not fit the others.
        """
        given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if "WORLD_SIZE" not in given:
            return cls()
        if len(given) < len(VARIABLES) or not all(value.isdecimal() for value in given.values()):
            raise DitAccelError(
                f"A launcher sets {', '.join(VARIABLES)} to integers, got {given}; unset them or set all three."
            )
        index, count, local = (int(given[name]) for name in VARIABLES)
        if not index < count:
            raise DitAccelError(f"RANK counts from 0 to WORLD_SIZE - 1, got RANK={index} and WORLD_SIZE={count}.")
        return cls(index, count, local)

    @classmethod
    def join(cls, device: str) -> ProcessRank:
        """This process after it has met the others, if a launcher started several; torchmetrics then adds up over all.

        Args:
            device: as asked for; "cpu" keeps off GPUs that are there.
        """
        state = meet(device)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def wait(self) -> None:
        """Wait until all processes are here."""
        meet().wait_for_everyone()

    @property
    def main(self) -> bool:
        """Whether this is the one that writes what all have in common."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: a run of neighbours, so that parts gathered in the processes' order are in order."""
        begin, end = (len(items) * index // self.count for index in (self.index, self.index + 1))
        return list(items[begin:end])

    def device(self, asked: str) -> str:
        """The device of this process: where several share GPUs and none is named, each has its own."""
        import torch

        own_gpu = self.count > 1 and asked == "auto" and torch.cuda.is_available()
        return f"cuda:{self.local}" if own_gpu else asked


def meet(device: str = "auto") -> PartialState:
    """Join the other processes, if a launcher started several; the first call in a process decides.

    Args:
        device: as asked for; "cpu" keeps off GPUs that are there.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Where no GPU is and nobody says cpu, accelerate takes each process for the only one, and all write the same files.
    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)
