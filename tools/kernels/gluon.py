"""The builds of the Gluon kernels, for compute capability 9.0: the launchers' own constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from triton.experimental.gluon import language as gl

from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.kernels.block_sparse.gluon import LAUNCH, ROWS, constants
from dit_accel.kernels.block_sparse.gluon_copies import KEYS
from dit_accel.kernels.block_sparse.triton import RASTER
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import POINTERS, TILES
from tools.kernels.sla import POINTERS as SLA_POINTERS


def builds(arch: int) -> Iterator[Build]:
    """Both kernels, with SLA's default feature map."""
    if arch == 90:
        for build in _block_sparse():
            yield build
            yield _sla(build)


def _block_sparse() -> Iterator[Build]:
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
            warps=LAUNCH.warps,
            stages=stages,
            needs=2 * head_dim * (2 * ROWS + 2 * stages * KEYS.value),
            registers=LAUNCH.registers,
        )


def _boxes(tile: Shape, rows: int, head_dim: int) -> list[tuple[str, str]]:
    """Types of a tensor's two descriptors, as `gluon.describe` makes them; "data" stands for the dtype."""
    run, tiled = (1, 1, rows, head_dim), (1, *tile, head_dim)
    boxes = {"tile": run if tile == RASTER else tiled, "run": run}
    return [
        (kind, f"tensordesc<data[{','.join(map(str, box))}],{gl.NVMMASharedLayout(128, 16, rank=len(box))!r}>")
        for kind, box in boxes.items()
    ]


def _sla(build: Build) -> Build:
    """SLA's build like one of the engine."""
    of_engine, dim = dict(build.pointers), dict(build.constants)["D"]
    exact = [(f"exact_{kind}", of_engine[f"out_{kind}"]) for kind in ("tile", "run")]
    table = f"tensordesc<data[{dim},{dim}],{gl.NVMMASharedLayout(128, 16, rank=2)!r}>"
    return dataclasses.replace(
        build,
        kernel="sla_gluon_forward",
        function="dit_accel.kernels.sla.gluon_forward:sparse_linear_gluon_fwd_kernel",
        constants=(*build.constants, ("MAP", "softmax")),
        pointers=(*SLA_POINTERS, *build.pointers, *exact, ("sums", "*fp32"), ("table", table)),
    )
