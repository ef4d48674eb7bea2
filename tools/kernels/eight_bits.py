"""The builds of `triton8`, for the consumer cards that it is made for; block sizes as `block_sparse` has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.block_sparse.triton_configs import QUANTISE, launches_8
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import POINTERS, TILES

ARCHS = (86, 89, 120)
BLOCKS = ((128, 64), (64, 64))  # queries x keys
MODULE = "dit_accel.kernels.block_sparse.triton8_kernels"
EIGHT_BIT_POINTERS = dict(POINTERS) | {
    "k8": "*i8",
    "v16": "*fp16",
    "steps": "*fp32",
    "scales": "*fp32",
    "sums": "*fp32",
}


def builds(arch: int) -> Iterator[Build]:
    """The forward kernel for each block size, head dimension and launch, and those that quantise keys and values."""
    for head_dim in (64, 128):
        dims = {"D": head_dim, "BLOCK_D": head_dim, "ALIGN": 8}
        keys = {"BLOCK_K": 64, "TILE_K": TILES[64]}
        for name, function, constants in (
            ("sums", "key_value_sums_kernel", {**dims, **keys}),
            ("scales", "key_value_scales_kernel", {"BLOCK_D": head_dim}),
            ("quantise", "quantise_kernel", {**dims, **keys}),
        ):
            yield _build(f"triton8_{name}_forward", function, constants, QUANTISE.warps, QUANTISE.stages, dots=False)
        for block_q, block_k in BLOCKS:
            for launch in launches_8(block_q, block_k, head_dim):
                blocks = {"BLOCK_Q": block_q, "TILE_Q": TILES[block_q], "BLOCK_K": block_k, "TILE_K": TILES[block_k]}
                constants = {**dims, **blocks, "STEP": launch.step, "HAS_TABLES": True}
                needs = block_q * head_dim + (launch.stages - 1) * (3 * launch.step * head_dim + 8 * block_q)
                yield _build(
                    "triton8_forward", "block_sparse_8_fwd_kernel", constants, launch.warps, launch.stages, needs
                )


def _build(
    name: str, function: str, constants: dict[str, Any], warps: int, stages: int, needs: int = 0, dots: bool = True
) -> Build:
    pointers = tuple(EIGHT_BIT_POINTERS.items())
    return Build(name, f"{MODULE}:{function}", tuple(constants.items()), pointers, warps, stages, needs, dots)
