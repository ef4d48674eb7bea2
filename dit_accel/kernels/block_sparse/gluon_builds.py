"""What `kernels.ahead_of_time` compiles of the Gluon kernel: all sizes in tiles, and one in raster order."""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental.gluon import language as gl

from dit_accel.kernels.ahead_of_time import Build
from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.kernels.block_sparse.gluon import LAUNCH, RASTER, ROWS, constants
from dit_accel.kernels.block_sparse.triton_builds import POINTERS, TILES


def builds(arch: int) -> Iterator[Build]:
    """On compute capability 9.0, the launcher's own constants."""
    if arch != 90:
        return
    for block_k, head_dim, tiled in (
        (64, 128, True),
        (64, 128, False),
        (128, 128, True),
        (64, 64, True),
        (128, 64, True),
    ):
        chosen = constants(head_dim, block_k, *((TILES[128], TILES[block_k]) if tiled else (RASTER, RASTER)))
        half, tile_k, stages = chosen["HALF"], chosen["TILE_K"], chosen["STAGES"]
        yield Build(
            kernel="gluon_forward",
            function="dit_accel.kernels.block_sparse.gluon_forward:block_sparse_gluon_fwd_kernel",
            constants=tuple(chosen.items()),
            pointers=(
                *POINTERS,
                *((f"{x}_{kind}", box) for x in ("q", "out") for kind, box in _boxes(half, ROWS, head_dim)),
                *((f"{x}_{kind}", box) for x in ("k", "v") for kind, box in _boxes(tile_k, block_k, head_dim)),
            ),
            warps=LAUNCH["num_warps"],
            stages=stages,
            needs=2 * head_dim * (2 * ROWS + 2 * stages * block_k),
            registers=LAUNCH["maxnreg"],
        )


def _boxes(tile: Shape, rows: int, head_dim: int) -> list[tuple[str, str]]:
    """Types of a tensor's two descriptors, as `gluon.describe` makes them; "data" stands for the dtype."""
    run, tiled = (1, 1, rows, head_dim), (1, *tile, head_dim)
    boxes = {"tile": run if tile == RASTER else tiled, "run": run}
    return [
        (kind, f"tensordesc<data[{','.join(map(str, box))}],{gl.NVMMASharedLayout(128, 16, rank=len(box))!r}>")
        for kind, box in boxes.items()
    ]
