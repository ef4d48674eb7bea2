"""Launch settings of the Triton kernels, for the launcher, the autotuner and the builds of `tools/kernels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

# Shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of capabilities).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
BIG = (80, 90, 100, 103)  # data-center chips
LARGEST_BLOCK = 128  # tokens; larger blocks run in halves
KERNELS = ("forward", "dq", "dkdv")
TUNED_BY = ("BLOCK_Q", "BLOCK_K", "BLOCK_D", "HAS_TABLES")  # lengths, strides and list widths are no part of it


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        warps, stages: warps of a program, and tiles in flight in its loop.
        step: rows of a listed block that are taken at a time: keys, and query rows for dk and dv.
        registers: most that a thread gets at the launch; None: the compiler decides.
    """

    warps: int
    stages: int
    step: int
    registers: int | None = None


PLACES = Launch(warps=1, stages=1, step=64)  # of the kernel that places the entries of a list
QUANTISE = Launch(warps=4, stages=1, step=64)  # of the kernels that quantise keys and values
STAGES = 3  # Triton's own, for a kernel without a pipelined loop


def launches(kernel: str, block_q: int, block_k: int, block_d: int, capability: int) -> Iterator[Launch]:
    """Candidates for a kernel on a compute capability (90 for 9.0), best first. None spills in a loop.

    Registers hold an fp32 accumulator of the block's rows x block_d, the scores of one step, and their weights.

    * Capabilities 9.0 and 10.0 multiply out of shared memory, and a group of 4 warps holds 64 rows. On others each warp
      also holds the step's rows in registers, so the step or the number of rows is half as large.
    * The step is smaller for dq, which holds a second product, and for dk and dv, which have two accumulators.
    * More stages hide more of the latency of loads; shared memory limits them. From 3 stages on, a loop loads tiles
      while it multiplies others.
    * On chips that are not in `BIG`, 4 warps spill even at 64 x 64.
    """
    block, listed = (block_k, block_q) if kernel == "dkdv" else (block_q, block_k)
    generation, small = capability // 10, block * block_d <= 64 * 64
    grouped = generation == 9 or (generation == 10 and kernel == "forward")
    warps = 4 if capability in BIG and block <= 64 and block_d <= 128 and (small or grouped) else 8
    if kernel == "dkdv":
        step = {9: 32, 10: 64}.get(generation, 32 if block * block_d <= 64 * 128 else 16)
    elif kernel == "dq":
        step = (64 * 128 if generation == 9 and block > 64 else 64 * 64) // block_d
    else:
        step = (64 * 128 if generation in (9, 10) or block * block_d <= 64 * 128 else 64 * 64) // block_d
    longest = 128 if generation == 9 and kernel == "forward" else 64
    step = min(listed, longest, max(16, step))
    yield from (Launch(warps, stages, step) for stages in range(4 if kernel == "forward" else 3, 0, -1))


def launches_8(block_q: int, block_k: int, block_d: int) -> tuple[Launch, ...]:
    """Candidates for the kernel with 8 bits, best first: 16 queries a warp. Keys and values are 3 bytes an element.

    Four stages spill two registers at 64 queries and a head dimension of 64.
    """
    warps, step = max(4, block_q // 16), min(64, block_k)
    stages = (3, 4) if block_q * block_d > 64 * 64 else (3,)
    return tuple(Launch(warps, n, step) for n in stages)


def words_launch(block_q: int) -> Launch:
    """Of the kernel that writes the bits of partial blocks: a thread for each query."""
    return Launch(max(1, block_q // 32), STAGES, block_q)


def shared_bytes(
    kernel: str, launch: Launch, block_q: int, block_k: int, block_d: int, itemsize: int, capability: int
) -> int:
    """Least shared memory of a launch in bytes: the operands that stay, and the tiles and words being loaded.

    9.0 and 10.0 multiply out of shared memory, so a tile's room is free a step later.
    """
    tile = block_d * itemsize
    if kernel == "dkdv":
        stay = 2 * block_k * tile
    elif kernel == "dq":
        stay = 2 * block_q * tile
    else:
        stay = block_q * (tile + 8 * (launch.stages - 1))
    tiles = launch.stages if capability // 10 in (9, 10) else max(1, launch.stages - 1)
    return stay + tiles * 2 * launch.step * tile


def fitting(kernel: str, block_q: int, block_k: int, block_d: int, itemsize: int, capability: int) -> list[Launch]:
    """The best candidates that fit the shared memory of a compute capability (90 for 9.0); empty if none fits.

    Two for the forward kernel, if two keep tiles in flight, and one for the others, so that tuning and ahead-of-time
    compilation stay short.
    """
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    fit = [
        launch
        for launch in launches(kernel, block_q, block_k, block_d, capability)
        if shared_bytes(kernel, launch, block_q, block_k, block_d, itemsize, capability) <= limit
    ]
    return fit[: 2 if kernel == "forward" and len(fit) > 1 and fit[1].stages > 2 else 1]
