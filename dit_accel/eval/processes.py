"""The processes that `accelerate launch` started, or this one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Processes:
    """Who does what where several processes share a run.

    Attributes:
        index: of this process.
        count: of all of them.
    """

    def __init__(self, device: str) -> None:
        """Join the others.

        Args:
            device: as asked for; "cpu" keeps off GPUs that are there.
        """
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu")
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the one that writes what all have in common."""
        return self.index == 0

    def device(self, asked: str) -> str:
        """The device of this process: where several share GPUs and none is named, each has its own."""
        own: torch.device = self._state.device
        return str(own) if self.count > 1 and asked == "auto" and own.type == "cuda" else asked

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: a run of neighbours, so that parts gathered in the processes' order are in order."""
        begin, end = (len(items) * index // self.count for index in (self.index, self.index + 1))
        return list(items[begin:end])

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def tell(self, value: Any) -> Any:
        """What the main process has, on all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        (told,) = broadcast_object_list([value])
        return told
