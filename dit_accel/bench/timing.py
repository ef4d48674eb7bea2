"""Times of compared calls, which take turns, so that other load slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

LEAST = 5  # rounds, whatever the budget
PROFILED, KERNELS = 3, 12  # calls in a profile, and the kernels that it shows
LEVEL_2 = 256 << 20  # bytes written between calls on a GPU, larger than its caches

Call = Callable[[], object]


def alternate(
    calls: Mapping[str, Call], seconds: float, device: torch.device, least: int = LEAST
) -> dict[str, list[float]]:
    """Milliseconds of each call, by name. A first round does not count.

    On a GPU events time the work, and the caches are emptied before each call; elsewhere the clock does.

    Args:
        seconds: for all rounds together.
        least: number of rounds, even if they take longer.
    """
    once = _gpu_clock(device) if device.type == "cuda" else _clock
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        once(call)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            milliseconds[name].append(once(call))
        rounds += 1
    return milliseconds


def profile(call: Call, device: torch.device) -> str:
    """The time of a call by kernel: the profiler's table of the longest."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=60)


def quantiles(times: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile by name."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms_p50": tenths[4], "ms_p20": tenths[1], "ms_p80": tenths[7]}


def _clock(call: Call) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def _gpu_clock(device: torch.device) -> Callable[[Call], float]:
    cache = torch.empty(LEVEL_2, dtype=torch.int8, device=device)
    stream = torch.cuda.current_stream(device)  # an event without a stream takes that of the current device

    def once(call: Call) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        began.record(stream)
        call()
        ended.record(stream)
        ended.synchronize()
        return began.elapsed_time(ended)

    return once
