"""Time of work on a device: from the clock on a CPU, from events in the stream on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Stopwatch:
    """Adds up the time of work on `device` between each `start` and `stop`, without making a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clocked = 0.0
        self._began: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin a time span."""
        self._began = self._mark()

    def stop(self) -> None:
        """Add the time since `start`."""
        ended = self._mark()
        if self._device.type == "cuda":
            self._events.append((self._began, ended))
        else:
            self._clocked += ended - self._began

    @property
    def seconds(self) -> float:
        """The sum; waits for the GPU."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._clocked + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@contextlib.contextmanager
def attention_time(pipe: Any, device: torch.device) -> Iterator[Stopwatch]:
    """Time a pipeline's self-attention modules (projections, attention and output) inside a with block.

    The transformers must not be compiled: hooks inside a compiled block break its graph.
    """
    from dit_accel.pipelines.targets import find_transformers

    watch = Stopwatch(device)
    handles = []
    for transformer, family in find_transformers(pipe)[0].values():
        for _, module in family.attentions(transformer):
            handles.append(module.register_forward_pre_hook(lambda *call: watch.start()))
            handles.append(module.register_forward_hook(lambda *call: watch.stop()))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
