"""Launch settings of the Triton kernels, for the launcher, the autotuner and the builds of `tools/kernels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dit_accel.kernels.block_sparse import triton_configs as block_sparse
from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES, Launch

MARGINAL_BLOCK = 64  # tokens; more sums and feature maps in fp32 do not fit the registers. Query blocks are halved
FUSED = ("forward", "dq", "dkdv")  # the kernels of both branches
SPLIT = 2048  # tokens that one program sums; fixed, so that the order of sums depends on the length alone
OTHER_MAPS = {"focused": "needs one more sum of a row in its gradient", "hedgehog": "has 2 D features a token"}
HEAD_DIMS = (64, 128)  # compiled ahead of time; others are padded in registers to the next power of two
# Launches are tuned separately for these constants: no length, and no tile, which follows from the grid
TUNED_BY = ("BLOCK", "BLOCK_Q", "BLOCK_K", "BLOCK_D", "MAP", "SCOPE")


def unsupported(
    head_dim: int, block_q: int, block_k: int, linear_scope: str | None, feature_map: str | None = None
) -> str | None:
    """Why the kernels cannot compute such a call, or None; scope None: without linear branch. Needs no Triton."""
    if linear_scope == "marginal" and (block_k > MARGINAL_BLOCK or block_q > 2 * MARGINAL_BLOCK):
        return (
            f"the kernels over marginal blocks take blocks of up to {2 * MARGINAL_BLOCK} queries and {MARGINAL_BLOCK} "
            f"keys, not {block_q} and {block_k}"
        )
    if feature_map in OTHER_MAPS:
        return (
            f"the kernels do not compute the feature map {feature_map}, which {OTHER_MAPS[feature_map]}; softmax, elu "
            "and relu have kernels"
        )
    if linear_scope is not None and head_dim > HEAD_DIMS[-1]:
        return f"the kernels of the linear branch take head dimensions up to {HEAD_DIMS[-1]}, not {head_dim}"
    return None


def key_rows(sizes: Mapping[str, Any], capability: int) -> int:
    """Rows of a key block for which one program sums dk and dv.

    In scope "marginal" on architectures with `mma.sync` (all but 9.0 and 10.0), warps share a product of 64 x 128 by
    columns. Each then holds all rows of phi(k) and v, 256 registers a thread. 32 rows fit, and queries are read twice.
    """
    block, wide = sizes["BLOCK_K"], sizes["BLOCK_K"] * sizes["BLOCK_D"] > 64 * 64
    return 32 if sizes["SCOPE"] == "marginal" and wide and capability // 10 not in (9, 10) else block


def launches(kernel: str, sizes: Mapping[str, Any], itemsize: int, capability: int) -> tuple[Launch, ...]:
    """Candidates for a kernel on a compute capability (90 for 9.0), best first, without any that spills.

    Kernels bound by memory, both branches in scope "marginal", and fp32, which only tests use, have one candidate.
    Others have two; for scope "all" see `fitting`. `sizes` are the kernel's compile-time constants, `itemsize` the
    bytes of an element of q, k and v.
    """
    wide, generation = sizes["BLOCK_D"] > 64, capability // 10
    # the block whose rows are taken in steps
    taken = sizes.get("BLOCK", sizes.get("BLOCK_Q" if kernel == "dkdv" else "BLOCK_K", 64))
    if itemsize == 4:
        return (Launch(warps=8 if wide else 4, stages=1, step=min(32, taken)),)
    if kernel in FUSED:
        candidates = _marginal(kernel, wide, generation)
    elif kernel == "state":
        # 8 warps hold a table of D x D sums and a step's features
        candidates = (Launch(8, 3, 64),)
    else:  # sums; features of 64 rows spill on 12.0
        candidates = (Launch(8, 2, 32 if wide and generation == 12 else 64),)
    return tuple(dict.fromkeys(dataclasses.replace(launch, step=min(launch.step, taken)) for launch in candidates))


def _marginal(kernel: str, wide: bool, generation: int) -> tuple[Launch, ...]:
    """The candidate whose registers hold sums of 64 rows and feature maps in fp32.

    On 9.0 and 10.0, steps of 64 with 4 warps take the fewest instructions a row: a group of 4 warps holds 64 rows, and
    8 warps on 9.0 compute the scores twice. 8 warps are used where 4 spill in loops, and on 10.0 where 4 leave no room
    for a second program. Steps of 32 are used on 9.0 where 64 spill.
    """
    stages = 3 if kernel == "forward" else 2
    if generation not in (9, 10):
        return (Launch(8, stages, 64 if kernel == "forward" else 32),)
    step = 32 if wide and generation == 9 and kernel != "dq" else 64
    warps = 8 if wide and (kernel == "dkdv" or (kernel == "dq" and generation == 10)) else 4
    return (Launch(warps, stages, step),)


def shared_bytes(kernel: str, launch: Launch, sizes: Mapping[str, Any], itemsize: int, capability: int) -> int:
    """Least shared memory of a launch in bytes: what stays, and the tiles in flight."""
    if kernel not in (*FUSED, "state", "sums"):
        return 0
    if kernel in FUSED:
        blocks = sizes["BLOCK_Q"], sizes["BLOCK_K"], sizes["BLOCK_D"]
        return block_sparse.shared_bytes(kernel, launch, *blocks, itemsize, capability)
    return (2 * launch.stages - 1) * launch.step * sizes["BLOCK_D"] * itemsize


def fitting(kernel: str, sizes: Mapping[str, Any], itemsize: int, capability: int) -> tuple[Launch, ...]:
    """The candidates that fit the shared memory of a compute capability; empty if none does.

    In scope "all" the fused kernels run the block-sparse engine's loops and have the engine's candidates.
    """
    if sizes.get("SCOPE") == "all":
        blocks = sizes["BLOCK_Q"], sizes["BLOCK_K"], sizes["BLOCK_D"]
        return tuple(block_sparse.fitting(kernel, *blocks, itemsize, capability))
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    return tuple(
        launch
        for launch in launches(kernel, sizes, itemsize, capability)
        if shared_bytes(kernel, launch, sizes, itemsize, capability) <= limit
    )
