"""Launch settings of the router's Triton kernels, and what `kernels.ahead_of_time` compiles of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.ahead_of_time import Build

MAX_BLOCKS = 1 << 12  # the longest row of scores that registers hold with all parts of a rule
SCORES = {"ROWS": 32, "COLUMNS": 32, "PART": 16}  # of a program's scores, and the dimensions of a step
FOLDER = "dit_accel.kernels.router.triton_kernels"
HEAD_DIMS = (64, 128)
WIDTHS = (512, 2048, MAX_BLOCKS)  # rows of scores at 32,760 and at 75,600 tokens, and the longest
CELLS = (1, 4)
PARTS = ("HAS_THRESHOLD", "HAS_COUNT", "HAS_SHARE", "HAS_GUARD", "HAS_FORCED")
FLOATS = ("means", "query_means", "key_means", "scores", "thresholds", "shares")
INTEGERS = ("query_sizes", "key_sizes", "wanted", "indices", "counts")
POINTERS = (
    ("x", "data"),
    *((name, "*fp32") for name in FLOATS),
    *((name, "*i32") for name in INTEGERS),
    *((name, "*u8") for name in ("pooled", "ranked", "forced")),
    *((name, "fp32") for name in ("scale", "factor")),
)


def unsupported(head_dim: int, blocks: int) -> str | None:
    """The reason why the kernels cannot compute such a call, or None."""
    if blocks > MAX_BLOCKS:
        return f"the router's kernel takes at most {MAX_BLOCKS} visual key blocks, not {blocks}"
    if head_dim > 256:
        return f"the router's kernels take head dimensions up to 256, not {head_dim}"
    return None


def width_of(blocks: int) -> int:
    """Columns of a row's registers: a power of two."""
    return max(32, 1 << (blocks - 1).bit_length())


def warps_of(width: int) -> int:
    """At most 16 scores a thread; 32 and all parts of a rule spill."""
    return max(1, width // 512)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel for each head dimension, cut and length of rows, each part of a rule by itself and all together."""
    for head_dim, cells in itertools.product(HEAD_DIMS, CELLS):
        sizes: dict[str, Any] = {"D": head_dim, "BLOCK_D": head_dim}
        yield _build("scores", {"D": head_dim, "CELLS": cells, **SCORES}, warps=4)
        for block, unit in itertools.product((64, 128), (False, True)):
            cut = {"BLOCK": block, "TILE_T": block // 64, "TILE_H": 8, "TILE_W": 8}
            yield _build("cell_means", {**sizes, "ALIGN": 8, **cut, "CELL": block // cells, "UNIT": unit}, warps=4)
    for width in WIDTHS:
        for parts in [*({part} for part in PARTS), set(PARTS)]:
            yield _build("lists", {"WIDTH": width, **{part: part in parts for part in PARTS}}, warps_of(width))


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
