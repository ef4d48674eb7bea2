"""How slow a machine is, for tests that hold a time against a limit: the limit is for a machine of a known speed."""

import time

import torch

SECONDS = 0.05  # that the work takes on the machine for which limits are stated


def work():
    """Much of what planning is made of: sums and searches over a map of blocks, and many small tensors."""
    start = time.process_time()
    counts = torch.zeros(950, 1900, dtype=torch.int32)
    for step in range(6):
        counts = (counts + step).cumsum(1).to(torch.int32)
        (counts > step).nonzero()
    for step in range(2000):
        torch.arange(64).add_(step)
    return time.process_time() - start


def within(limit, timed, tries=20):
    """Whether `timed` takes less than the limit in seconds of process time, once in some tries.

    A machine on which `work` takes longer than SECONDS has as much more time; a faster one has no less.
    """
    times, slowness = [], []
    for _ in range(tries):
        start = time.process_time()
        timed()
        times.append(time.process_time() - start)
        slowness.append(work() / SECONDS)
        if min(times) < limit * max(1.0, min(slowness)):
            return True
    print(f"{min(times):.3f} s of {limit} s, on a machine {min(slowness):.1f} times as slow")
    return False
