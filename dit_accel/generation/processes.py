"""This process among those that `accelerate launch` or `torchrun` started, and its share of the work."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dit_accel.errors import DitAccelError
from dit_accel.files import InUse, hold, lock_of

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PATIENCE = datetime.timedelta(days=7)  # for slower processes; torch's default is ten minutes on GPUs
PAUSE = 1.0  # seconds before a process looks again at what others are making


@dataclasses.dataclass(frozen=True)
class ProcessRank:
    """The rank of a process: `index` of `count` in all, `local` on this machine, which is also the index of its GPU."""

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> ProcessRank:
        """The rank in the launcher's environment variables; 0 of 1 without them."""
        variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if "WORLD_SIZE" not in variables:
            return cls()
        if len(variables) < len(VARIABLES) or not all(value.isdecimal() for value in variables.values()):
            raise DitAccelError(
                f"A launcher sets {', '.join(VARIABLES)} to integers, got {variables}. Unset them or set all three."
            )
        index, count, local = (int(variables[name]) for name in VARIABLES)
        if not index < count:
            raise DitAccelError(f"RANK counts from 0 to WORLD_SIZE - 1, got RANK={index} and WORLD_SIZE={count}.")
        return cls(index, count, local)

    @classmethod
    def join(cls, device: str) -> ProcessRank:
        """The rank after joining the other processes, as `meet` does; torchmetrics then adds up over all of them."""
        state = meet(device)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def wait(self) -> None:
        """Wait for all processes."""
        meet().wait_for_everyone()

    @property
    def main(self) -> bool:
        """Whether this process writes the common results."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process: neighbours, so parts gathered by rank are in order."""
        begin, end = (len(items) * index // self.count for index in (self.index, self.index + 1))
        return list(items[begin:end])

    def claim(self, items: Sequence[T], place: Callable[[T], Path], missing: Callable[[T], bool]) -> Generator[T]:
        """Missing items, each reserved for this process until it asks for the next: its share, then what others leave.

        Processes meet in the file locks of a shared folder alone, so a killed one leaves its items to the others. The
        last item is there when this ends; without locks, the last one of the share.

        Args:
            items: hashable, the same in all processes.
            place: the file whose name an item's lock has.
            missing: whether an item is still to be made; asked again once it is reserved.

        Raises:
            DitAccelError: the folder cannot be written to.
        """
        share = self.share(items)
        begin = len(items) * self.index // self.count
        left, locks = [*items[begin:], *items[:begin]], True
        while left:
            busy = []
            for item in left:
                # a lock on an item that is there: of a process that still lists it, or of a killed one
                if not (missing(item) or (locks and lock_of(place(item)).exists())):
                    continue
                try:
                    with hold(place(item), folder=False) as locks:
                        if (locks or item in share) and missing(item):
                            yield item
                except InUse:
                    busy.append(item)
            if busy == left:
                time.sleep(PAUSE)
            left = busy

    def device(self, name: str) -> str:
        """The device of this process; "auto" gives each of several processes its own GPU."""
        import torch

        own_gpu = self.count > 1 and name == "auto" and torch.cuda.is_available()
        return f"cuda:{self.local}" if own_gpu else name


def meet(device: str = "auto") -> PartialState:
    """Join the other processes, if a launcher started several. The first call's `device` counts; "cpu" avoids GPUs."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # without GPU and cpu=True, accelerate takes each process for the only one, and all write the same files
    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)
