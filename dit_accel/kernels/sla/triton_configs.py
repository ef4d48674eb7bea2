"""Launch settings of the Triton kernels: the one table that launcher, tests and ahead-of-time checks read."""

from __future__ import annotations

import dataclasses

import torch

from dit_accel.kernels.block_sparse import triton_configs as block_sparse

MAX_BLOCKS = 1 << 13  # a row of scores that a program holds in registers
MARGINAL_BLOCK = 64  # tokens; accumulators of 128 x 128 beside feature maps in fp32 do not fit the registers
SPLIT = 2048  # tokens whose state one program sums; fixed, so that the order of the sum depends on the length alone
HEAD_DIMS = (64, 128)  # compiled ahead of time; others are padded in registers to the next power of two


def unsupported(dtype: torch.dtype, head_dim: int, block: int, blocks: int, linear_scope: str | None) -> str | None:
    """Why the kernels cannot compute such a call, or None if they can. Needs no Triton.

    Args:
        blocks: visual blocks.
        linear_scope: None for a call without linear branch.
    """
    obstacle = block_sparse.unsupported(dtype, head_dim, block, block)
    if obstacle is not None:
        return obstacle
    if blocks > MAX_BLOCKS:
        return f"the router's kernel takes at most {MAX_BLOCKS} visual blocks, not {blocks}"
    if linear_scope == "marginal" and block > MARGINAL_BLOCK:
        return f"the kernels over marginal blocks take blocks of up to {MARGINAL_BLOCK} tokens, not {block}"
    if linear_scope is not None and head_dim > HEAD_DIMS[-1]:
        return f"the kernels of the linear branch take head dimensions up to {HEAD_DIMS[-1]}, not {head_dim}"
    return None


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched: tokens (or query blocks) a step, warps of a program, tiles in flight in its loop."""

    rows: int
    warps: int
    stages: int


MEANS = Launch(rows=0, warps=4, stages=1)


def selection(blocks: int) -> tuple[int, Launch]:
    """Width of a row of scores, and the launch: 32 scores a thread, for what is computed from them takes registers."""
    width = 16
    while width < blocks:
        width *= 2
    warps = 4 if width <= 1024 else 8
    return width, Launch(rows=min(8, warps * 1024 // width), warps=warps, stages=1)


def linear(kernel: str, block_d: int, itemsize: int) -> Launch:
    """The launch of a kernel of the linear branch.

    A D x D accumulator and a D x D table need 8 warps from D = 128 on. fp32, which only tests use, takes fewer rows,
    for its tables take twice the shared memory.
    """
    warps = 8 if block_d > 64 or kernel in ("state", "sums") else 4
    if itemsize == 4:
        return Launch(rows=32, warps=warps, stages=1)
    return Launch(
        rows=128 if kernel == "apply" else 64,
        warps=warps,
        stages=3 if kernel == "state" else 2 if kernel == "sums" else 1,
    )


def shared_bytes(kernel: str, launch: Launch, block_d: int, itemsize: int) -> int:
    """Shared memory that a launch of the linear branch needs at least: its tables, and the tiles in flight."""
    tile = launch.rows * block_d * itemsize
    if kernel in ("state", "sums"):
        return (2 * launch.stages - 1) * tile
    return block_d * block_d * itemsize + tile


def marginal(block: int, block_d: int, itemsize: int, capability: int) -> Launch:
    """The launch of the kernels over marginal blocks on a compute capability (90 for 9.0).

    Accumulators of block x D stay in registers beside feature maps in fp32: 8 warps from 64 x 64 on. Where they lie in
    tensor memory (10.x) 4 warps do at D = 128, and at 64 a second tile in flight would spill. fp32, which only tests
    use, has one tile in flight: two would not fit the smaller GPUs.
    """
    tensor_memory = capability // 10 == 10
    if tensor_memory and block_d > 64:
        return Launch(rows=block, warps=4, stages=1 if itemsize == 4 else 2)
    warps = 8 if block * block_d >= 64 * 64 else 4
    return Launch(rows=block, warps=warps, stages=1 if itemsize == 4 or tensor_memory else 2)


def marginal_shared_bytes(block: int, launch: Launch, block_d: int, itemsize: int) -> int:
    """Shared memory that a kernel over marginal blocks needs at least: what stays, and two tiles in flight."""
    return (1 + 2 * launch.stages) * block * block_d * itemsize
