"""The builds of the router: the launches of its `triton_configs`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.router.triton_configs import MAX_BLOCKS, MAX_COUNTED, PARTS, SCORES, warps_of
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import HEADS, SIDE

FOLDER = "dit_accel.kernels.router.triton_kernels"
HEAD_DIMS = (64, 128)
WIDTHS = (512, 2048, MAX_BLOCKS)  # rows of scores at 32,760 and at 75,600 tokens, and the longest of all rules
CELLS = (1, 4)
FLOATS = ("means", "deviations", "query_means", "key_means", "scores", "thresholds", "shares")
INTEGERS = ("query_sizes", "key_sizes", "wanted", "indices", "counts", "worst")
POINTERS = (
    ("x", HEADS),
    ("side", SIDE),
    *((name, "*fp32") for name in FLOATS),
    *((name, "*i32") for name in INTEGERS),
    *((name, "*u8") for name in ("pooled", "ranked", "forced")),
    *((name, "fp32") for name in ("scale", "factor")),
)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel for each head dimension, cut and length of rows; each part of a rule, all together, and SLA's."""
    for head_dim, cells in itertools.product(HEAD_DIMS, CELLS):
        sizes: dict[str, Any] = {"D": head_dim, "BLOCK_D": head_dim}
        yield _build("scores", {"D": head_dim, "CELLS": cells, **SCORES}, warps=4)
        for block, unit in itertools.product((64, 128), (False, True)):
            cut = {"BLOCK": block, "TILE": (block // 64, 8, 8)}
            yield _build("cell_means", {**sizes, "ALIGN": 8, **cut, "CELL": block // cells, "UNIT": unit}, warps=4)
        for block in (64, 128) if cells == 1 else ():
            cut = {"BLOCK": block, "TILE": (block // 64, 8, 8), "PART": block}
            yield _build("deviations", {**sizes, "ALIGN": 8, **cut}, warps=4)
    for width in (*WIDTHS, MAX_COUNTED):
        every = [*({part} for part in PARTS), set(PARTS)] if width <= MAX_BLOCKS else [{"HAS_COUNT"}]
        for parts in (*every, {"HAS_COUNT", "HAS_SKIP"}):
            constants = {part: part in parts for part in (*PARTS, "HAS_SKIP")}
            yield _build("lists", {"WIDTH": width, **constants}, warps_of(width))


def _build(kernel: str, constants: dict[str, Any], warps: int) -> Build:
    return Build(
        kernel=f"router_{kernel}_forward",
        function=f"{FOLDER}:{kernel}_kernel",
        constants=tuple(constants.items()),
        pointers=POINTERS,
        warps=warps,
        stages=1,
        needs=0,
        dots=False,
    )
