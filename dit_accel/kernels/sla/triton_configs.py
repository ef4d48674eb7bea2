"""Launch settings of the Triton kernels: the table that launcher, autotuner, tests and ahead-of-time checks read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.kernels.block_sparse import triton_configs as block_sparse
from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES, Launch

MAX_BLOCKS = 1 << 13  # a row of scores that a program holds in registers
MARGINAL_BLOCK = 64  # tokens; accumulators of 128 x 128 beside feature maps in fp32 do not fit the registers
SPLIT = 2048  # tokens whose state one program sums; fixed, so that the order of the sum depends on the length alone
HEAD_DIMS = (64, 128)  # compiled ahead of time; others are padded in registers to the next power of two
# Constants by which launches are tuned apart: no length, and no tile, which follows from it
TUNED_BY = ("BLOCK", "BLOCK_D", "WIDTH", "HAS_SKIPPED", "MAP")


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


def width_of(blocks: int) -> int:
    """Width of a row of scores: the power of two, at least 16, that holds the blocks."""
    width = 16
    while width < blocks:
        width *= 2
    return width


def key_rows(block: int, block_d: int, capability: int) -> int:
    """Rows of a key block whose dk and dv one program sums.

    `mma.sync` (off 9.0 and 10.0) gives a product of 64 x 128 to warps side by side, each of which then holds all rows
    of phi(k) and of v: 256 registers a thread. Half the rows read the queries twice and spill nothing.
    """
    return 32 if block * block_d > 64 * 64 and capability // 10 not in (9, 10) else block


def launches(kernel: str, sizes: Mapping[str, Any], itemsize: int, capability: int) -> tuple[Launch, ...]:
    """Candidates for a kernel on a compute capability (90 for 9.0), best first: those that spill nowhere.

    One where there is nothing to choose: kernels that stream q, k or v once and are bound by memory (means and the
    backward of scope "all"), and fp32, which only tests use. Two elsewhere.

    Args:
        sizes: the kernel's compile-time constants.
        itemsize: bytes of an element of q, k and v.
    """
    if kernel == "means":
        return (Launch(warps=4, stages=1, step=sizes["BLOCK"]),)
    if kernel == "select":
        return _selecting(sizes["WIDTH"], capability)
    wide = sizes["BLOCK_D"] > 64
    if itemsize == 4:
        return (Launch(warps=8 if wide else 4, stages=1, step=min(32, sizes.get("BLOCK", 32))),)
    if kernel.startswith("marginal"):
        found = _marginal(kernel, wide, capability // 10)
    elif kernel == "state":
        # a table of D x D sums and a step's features: 8 warps hold both
        found = Launch(8, 3, 64), Launch(8, 2, 64) if wide else Launch(4, 2, 64)
    elif kernel == "sums":
        found = (Launch(8, 2, 64),)
    elif kernel == "apply":
        found = (Launch(8, 1, 128), Launch(8, 1, 64)) if wide else (Launch(4, 1, 128), Launch(4, 1, 64))
    else:
        found = (Launch(8 if wide else 4, 1, 64),)
    if "BLOCK" in sizes:
        found = tuple(dataclasses.replace(launch, step=min(launch.step, sizes["BLOCK"])) for launch in found)
    return tuple(dict.fromkeys(found))


def _selecting(width: int, capability: int) -> tuple[Launch, ...]:
    """16 or 32 scores a thread: what is computed from each takes registers. More rows a program read the keys less."""
    if width > 2048:
        return (Launch(16, 1, 8192 // width),)
    if width <= 512:
        return Launch(4, 1, 8), Launch(4, 1, 4)
    warps = width // 128
    found = Launch(warps, 1, 4), Launch(warps // 2, 1, 4)
    return found[1:] if warps == 16 and capability == 80 else found  # 16 warps spill there


def _marginal(kernel: str, wide: bool, generation: int) -> tuple[Launch, ...]:
    """Accumulators of a block beside feature maps in fp32: 8 warps. 10.x has the accumulators in tensor memory."""
    if kernel == "marginal":
        if generation == 10 and wide:
            return Launch(4, 2, 64), Launch(4, 2, 32)
        return Launch(8, 2, 64), Launch(8 if wide or generation == 10 else 4, 2, 32)
    if kernel == "marginal_dq":
        if wide:
            return Launch(8, 2, 64), Launch(8, 2, 16 if generation == 10 else 32)
        return Launch(8, 2, 32), Launch(8, 2, 64 if generation in (9, 10) else 16)
    if wide or generation in (9, 10):
        return Launch(8, 2, 32), Launch(8, 2, 16)
    return Launch(8, 2, 16), Launch(8, 1, 16)


def shared_bytes(kernel: str, launch: Launch, sizes: Mapping[str, Any], itemsize: int) -> int:
    """Shared memory that a launch needs at least: what stays, and the tiles in flight."""
    if kernel in ("means", "select"):
        return 0
    row = sizes["BLOCK_D"] * itemsize
    if kernel.startswith("marginal"):
        return (sizes["BLOCK"] + 2 * launch.stages * launch.step) * row
    if kernel in ("state", "sums"):
        return (2 * launch.stages - 1) * launch.step * row
    return (sizes["BLOCK_D"] + launch.step) * row


def fitting(kernel: str, sizes: Mapping[str, Any], itemsize: int, capability: int) -> tuple[Launch, ...]:
    """The candidates that the shared memory of a compute capability holds; empty if none does."""
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    return tuple(
        launch
        for launch in launches(kernel, sizes, itemsize, capability)
        if shared_bytes(kernel, launch, sizes, itemsize) <= limit
    )
