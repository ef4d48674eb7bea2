"""Launch settings of the Triton kernels: the one table that launcher, autotuner and ahead-of-time checks read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

# Shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of capabilities).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
KERNELS = ("forward", "dq", "dkdv")
BLOCKS = ((64, 64), (128, 64), (128, 128))  # queries x keys that are compiled ahead of time and tuned
HEAD_DIMS = (64, 128)  # others are padded in registers to the next power of two


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        warps, stages: warps of a program, and tiles in flight in its loop.
        step_q: query rows that dk and dv take at a time; 0 for the other kernels.
    """

    warps: int
    stages: int
    step_q: int = 0


def unsupported(dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Why the kernels cannot compute such a call, or None if they can. Needs no Triton."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256:
        return f"the kernels take head dimensions up to 256, not {head_dim}"
    for name, block in (("query", block_q), ("key", block_k)):
        if not 16 <= block <= 128 or block & (block - 1):
            return f"the kernels take {name} blocks of 16, 32, 64 or 128 tokens, not {block}"
    return None


def launches(kernel: str, block_q: int, block_k: int, block_d: int) -> Iterator[Launch]:
    """Candidates for a kernel, best first.

    An fp32 accumulator of block_q x block_d lives in registers, beside the scores and their weights: 8 warps from
    128 x 128 on (4 spill), 4 below. A loop hides a tile's latency behind as many in flight as shared memory holds.
    """
    if kernel == "dkdv":
        warps = 8 if block_k * block_d > 64 * 64 else 4
        yield from (Launch(warps, stages, min(block_q, 64)) for stages in (2, 1))
        return
    warps = 8 if block_q * max(block_d, block_k) >= 128 * 128 else 4
    yield from (Launch(warps, stages) for stages in ((3, 2, 1) if kernel == "forward" else (2, 1)))


def shared_bytes(kernel: str, launch: Launch, block_q: int, block_k: int, block_d: int, itemsize: int) -> int:
    """Shared memory that a launch needs at least: operands that stay, and the tiles in flight."""
    tile = block_d * itemsize
    if kernel == "dkdv":
        return 2 * block_k * tile + launch.stages * 2 * launch.step_q * tile
    stay = block_q * tile * (2 if kernel == "dq" else 1)
    return stay + launch.stages * 2 * block_k * tile


def fitting(kernel: str, block_q: int, block_k: int, block_d: int, itemsize: int, capability: int) -> list[Launch]:
    """The candidates that are tried on a compute capability (90 for 9.0): the best that its shared memory holds.

    Two for the forward kernel and one for the others, so that tuning and ahead-of-time compilation stay short. Empty if
    none fits.
    """
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    fit = [
        launch
        for launch in launches(kernel, block_q, block_k, block_d)
        if shared_bytes(kernel, launch, block_q, block_k, block_d, itemsize) <= limit
    ]
    return fit[: 2 if kernel == "forward" else 1]
