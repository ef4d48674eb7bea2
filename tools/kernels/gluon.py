"""The builds of the Gluon kernels, for compute capability 9.0: the launchers' own constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from dit_accel.kernels.block_sparse.geometry import Shape
from dit_accel.kernels.block_sparse.gluon.copies import KEYS, Distances, GluonProblem, TiledSide
from dit_accel.kernels.block_sparse.gluon.items import Queue
from dit_accel.kernels.block_sparse.gluon.launches import LAUNCHES, ROWS, STAGES_DKDV, STAGES_DQ, constants, half_of
from dit_accel.kernels.records import PseudoKeys, Visits
from dit_accel.kernels.tuning import RASTER
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import SAMPLES, TILES


def _problem(read: int) -> tuple[tuple[str, Any], ...]:
    """Types of the two records of all kernels, for as many tensors that are read."""
    tensors, usual, *numbers = SAMPLES
    pointers = "*i32", "*i32", "*i64", tensors, usual, numbers[0]
    return ("problem", GluonProblem(*pointers, SIDE, SIDE, *["i32"] * 6)), ("distances", (DISTANCES,) * read)


VISITS = Visits("*i32", "*i32", "*i32", "*i32", "*i64", "i32")
SIDE = TiledSide(*["i32"] * 9)
DISTANCES = Distances("i32", "i32", "i32")
POINTERS = (("lse", "*fp32"), ("scale", "fp32"), ("queue", Queue("*i32", "i32", "i32")), *_problem(3))


def builds(arch: int) -> Iterator[Build]:
    """All kernels, with SLA's default feature map."""
    if arch == 90:
        for build in _block_sparse():
            yield from (build, _sla(build), _tail(build, False), _tail(build, True))
            if build.config["d"] == 128 or build.config["block_k"] == 64:  # a smaller share of CI's time
                yield from (_dq(build), _dkdv(build))


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
            function="dit_accel.kernels.block_sparse.gluon.forward:block_sparse_gluon_fwd_kernel",
            constants=tuple(chosen.items()),
            pointers=(
                *POINTERS,
                *((f"{x}_{kind}", box) for x in ("q", "out") for kind, box in _boxes(half, ROWS, head_dim)),
                *((f"{x}_{kind}", box) for x in ("k", "v") for kind, box in _boxes(tile_k, block_k, head_dim)),
            ),
            warps=LAUNCHES[0].warps,
            stages=stages,
            needs=2 * head_dim * (2 * ROWS + 2 * stages * KEYS.value),
            registers=LAUNCHES[0].registers,
        )


def _dq(build: Build) -> Build:
    """The dq kernel's build like one of the forward kernel."""
    boxes, chosen = dict(build.pointers), dict(build.constants)
    like_q = [(f"{x}_{kind}", boxes[f"q_{kind}"]) for x in ("g", "o", "dq") for kind in ("tile", "run")]
    return dataclasses.replace(
        build,
        kernel="gluon_dq",
        function="dit_accel.kernels.block_sparse.gluon.dq:block_sparse_gluon_dq_kernel",
        constants=tuple((chosen | {"STAGES": STAGES_DQ}).items()),
        pointers=(*build.pointers, *like_q, *_problem(5), *((x, "*fp32") for x in ("grad_lse", "statistics"))),
        stages=STAGES_DQ,
        needs=2 * chosen["D"] * (6 * ROWS + 2 * STAGES_DQ * KEYS.value),
    )


def _dkdv(build: Build) -> Build:
    """The build of the kernel of dk and dv like one of the forward kernel."""
    like, chosen = _dq(build), dict(build.constants)
    dim, keys, tile_k = chosen["D"], chosen["BLOCK_K"], chosen["TILE_K"]
    part = tile_k if keys == ROWS else half_of(tile_k)
    boxes = [(f"{x}_{kind}", box) for x in ("k", "v", "dk", "dv") for kind, box in _boxes(part, ROWS, dim)]
    return dataclasses.replace(
        like,
        kernel="gluon_dkdv",
        function="dit_accel.kernels.block_sparse.gluon.dkdv:block_sparse_gluon_dkdv_kernel",
        constants=tuple((chosen | {"PART_K": part, "STAGES": STAGES_DKDV}).items()),
        pointers=(*like.pointers, *boxes, ("visits", VISITS), *_problem(4)),
        stages=STAGES_DKDV,
        needs=2 * dim * (2 * keys + 2 * STAGES_DKDV * ROWS) + (8 * dim * ROWS if keys == ROWS else 0),
    )


def _boxes(tile: Shape, rows: int, head_dim: int) -> list[tuple[str, str]]:
    """Types of a tensor's two descriptors, as `gluon.describe` makes them; "data" stands for the dtype."""
    run, tiled = (1, 1, rows, head_dim), (1, *tile, head_dim)
    boxes = {"tile": run if tile == RASTER else tiled, "run": run}
    return [
        (kind, f"tensordesc<data[{','.join(map(str, box))}],{gl.NVMMASharedLayout(128, 16, rank=len(box))!r}>")
        for kind, box in boxes.items()
    ]


def _tail(build: Build, share: bool) -> Build:
    """The build with the tail like one of the engine."""
    (_, run), _ = _boxes(RASTER, KEYS.value, dict(build.constants)["D"])
    return dataclasses.replace(
        build,
        kernel="tail_gluon_forward",
        function="dit_accel.kernels.tail.gluon_forward:tail_gluon_fwd_kernel",
        constants=(*build.constants, ("SHARE", share)),
        pointers=(
            *build.pointers, ("share", "*fp32"), ("pooled_k", run), ("pooled_v", run),
            ("pseudo", PseudoKeys("data", "data", "*fp32", "*u8", "i32")),
        ),
        needs=build.needs + 4 * build.stages * KEYS.value,
    )  # fmt: skip


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
        pointers=(*build.pointers, *exact, ("sums", "*fp32"), ("table", table)),
    )
