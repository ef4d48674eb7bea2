"""The builds of the block-sparse engine: the launches of its `triton_configs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.block_sparse.triton_configs import (
    KERNELS,
    PLACES,
    STAGES,
    fitting,
    launches,
    shared_bytes,
    words_launch,
)
from dit_accel.kernels.records import Heads, Lists, SampleSegments, SegmentRows, Side, Visits
from dit_accel.kernels.tuning import RASTER
from tools.kernels.ahead_of_time import Build

BLOCKS = ((64, 64), (128, 64), (128, 128), (128, 32))  # queries x keys
HEAD_DIMS = (64, 128)  # others are padded in registers to the next power of two
FUNCTIONS = {
    "forward": "triton_forward:block_sparse_fwd_kernel",
    "dq": "triton_backward:block_sparse_bwd_kernel_dq",
    "dkdv": "triton_backward:block_sparse_bwd_kernel_dkdv",
}
TILES = {32: (1, 4, 8), 64: (1, 8, 8), 128: (2, 8, 8)}
HEADS = Heads("data", "i32", "i32", "i32")
SIDE = Side(*["i32"] * 7)
SAMPLES = SampleSegments(SegmentRows(*["*i32"] * 4), SegmentRows(*["i32"] * 4), "i32", "i32")
POINTERS = (
    *((name, HEADS) for name in ("q", "k", "v", "grad_out")),
    *((name, "data") for name in ("out", "dq", "dk", "dv")),
    *((name, "*fp32") for name in ("lse", "grad_lse", "delta")),
    *((name, SIDE) for name in ("keys", "queries")),
    ("lists", Lists("*i32", "*i32", "*i64", "i32", "i32")),
    ("visits", Visits("*i32", "*i32", "*i32", "*i32", "*i64", "i32")),
    ("samples", SAMPLES),
    *((name, "*i32") for name in ("tables", "indices", "counts")),
    ("words", "*i64"),
    ("scale", "fp32"),
)


def builds(arch: int) -> Iterator[Build]:
    """Each kernel, block size, head dimension and launch; with tables in tile order, one size also in raster order.

    That size's dq also with a gradient of the LSE.
    """
    for block_q, block_k in BLOCKS:
        for tiled in (True, False):
            yield Build(
                kernel="block_sparse_words_forward",
                function="dit_accel.kernels.block_sparse.triton_words:partial_words_kernel",
                constants=tuple(_blocks(block_q, block_k, tiled).items()),
                pointers=POINTERS,
                warps=words_launch(block_q).warps,
                stages=STAGES,
                needs=0,
                dots=False,
            )
    for block, tile in TILES.items():
        yield Build(
            kernel="block_sparse_places_forward",
            function="dit_accel.kernels.block_sparse.triton_places:place_lists_kernel",
            constants=(("BLOCK", block), ("TILE", tile), ("STEP", PLACES.step)),
            pointers=(*POINTERS, ("places", "*i32"), ("spans", "*i32")),
            warps=PLACES.warps,
            stages=PLACES.stages,
            needs=0,
            dots=False,
        )
    for kernel in KERNELS:
        for block_q, block_k in BLOCKS:
            for head_dim in HEAD_DIMS:
                if not compiled(kernel, block_k):
                    continue
                sizes = (kernel, block_q, block_k, head_dim)
                # shown as left out where not even the smallest fits
                smallest = list(launches(*sizes, capability=arch))[-1:]
                for launch in fitting(*sizes, itemsize=2, capability=arch) or smallest:
                    # raster order differs in address arithmetic alone: one size stands for all
                    one = (block_q, block_k, head_dim) == (128, 64, 128)
                    for tiled, flags in _variants(kernel) if one else _variants(kernel)[:1]:
                        constants = {
                            "D": head_dim,
                            "BLOCK_D": head_dim,
                            "ALIGN": 8,
                            **_blocks(block_q, block_k, tiled),
                            "HAS_TABLES": True,
                            "STEP": launch.step,
                            **flags,
                        }
                        yield Build(
                            kernel=f"block_sparse_{kernel}",
                            function=f"dit_accel.kernels.block_sparse.{FUNCTIONS[kernel]}",
                            constants=tuple(constants.items()),
                            pointers=(*POINTERS, ("out", HEADS)) if kernel == "dq" else POINTERS,
                            warps=launch.warps,
                            stages=launch.stages,
                            needs=shared_bytes(kernel, launch, *sizes[1:], itemsize=2, capability=arch),
                        )


def compiled(kernel: str, block_k: int) -> bool:
    """Whether it is among the builds: blocks of 32 keys in one direction alone, a smaller share of CI's time."""
    return block_k >= 64 or kernel == "forward"


def _variants(kernel: str) -> tuple[tuple[bool, dict[str, bool]], ...]:
    """Whether blocks are tiles, and constants of this kernel alone; the usual first."""
    if kernel == "dq":
        return (True, {"HAS_GRAD_LSE": False}), (True, {"HAS_GRAD_LSE": True}), (False, {"HAS_GRAD_LSE": False})
    return (True, {}), (False, {})


def _blocks(block_q: int, block_k: int, tiled: bool) -> dict[str, Any]:
    tiles = (TILES[block_q], TILES[block_k]) if tiled else (RASTER, RASTER)
    return {"BLOCK_Q": block_q, "TILE_Q": tiles[0], "BLOCK_K": block_k, "TILE_K": tiles[1]}
