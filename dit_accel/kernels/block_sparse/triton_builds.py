"""What `kernels.ahead_of_time` compiles of this folder: every launch of `triton_configs`, in both orders."""

from __future__ import annotations

from collections.abc import Iterator

from dit_accel.kernels.ahead_of_time import Build
from dit_accel.kernels.block_sparse.triton_configs import BLOCKS, HEAD_DIMS, KERNELS, fitting, launches, shared_bytes

FUNCTIONS = {
    "forward": "triton_forward:block_sparse_fwd_kernel",
    "dq": "triton_backward:block_sparse_bwd_kernel_dq",
    "dkdv": "triton_backward:block_sparse_bwd_kernel_dkdv",
}
TILES = {64: (1, 8, 8), 128: (2, 8, 8)}
RASTER = (0, 0, 0)
DATA = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")
INTEGERS = ("entries", "pure_counts", "counts", "firsts", "tables")
STARTS = ("visual_starts", "reference_starts", "text_starts", "text_lens")
POINTERS = (
    *((name, "data") for name in DATA),
    *((name, "*i32") for name in (*INTEGERS, *STARTS)),
    ("lse", "*fp32"),
    ("delta", "*fp32"),
    ("scale", "fp32"),
)


def builds(arch: int) -> Iterator[Build]:
    """Each kernel, block size, head dimension and launch; with tables in tile order, one size also in raster order."""
    for kernel in KERNELS:
        for block_q, block_k in BLOCKS:
            for head_dim in HEAD_DIMS:
                sizes = (kernel, block_q, block_k, head_dim)
                # shown as left out where not even the smallest fits
                smallest = list(launches(*sizes, capability=arch))[-1:]
                for launch in fitting(*sizes, itemsize=2, capability=arch) or smallest:
                    # raster order differs in address arithmetic alone: one size stands for all
                    for tiled in (True, False) if (block_q, block_k, head_dim) == (128, 64, 128) else (True,):
                        tiles = (TILES[block_q], TILES[block_k]) if tiled else (RASTER, RASTER)
                        names = ("TILE_QT", "TILE_QH", "TILE_QW", "TILE_KT", "TILE_KH", "TILE_KW")
                        constants = {
                            "D": head_dim,
                            "BLOCK_D": head_dim,
                            "ALIGN": 8,
                            "BLOCK_Q": block_q,
                            "BLOCK_K": block_k,
                            **dict(zip(names, (*tiles[0], *tiles[1]), strict=True)),
                            "HAS_TABLES": True,
                            "PRECISION": "ieee",
                            "STEP": launch.step,
                        }
                        yield Build(
                            kernel=f"block_sparse_{kernel}",
                            function=f"dit_accel.kernels.block_sparse.{FUNCTIONS[kernel]}",
                            constants=tuple(constants.items()),
                            pointers=POINTERS,
                            warps=launch.warps,
                            stages=launch.stages,
                            needs=shared_bytes(kernel, launch, *sizes[1:], itemsize=2),
                        )
