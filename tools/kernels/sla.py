"""The builds of sparse-linear attention: the launches of its `triton_configs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.records import Lists, SegmentRows
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.arguments import LINEAR_SCOPES
from dit_accel.kernels.sla.triton_backward import Statistics
from dit_accel.kernels.sla.triton_forward import SavedBranches
from dit_accel.kernels.sla.triton_linear import Routes, Selecting, StateTable, TokenLayout
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import HEADS, SIDE

FOLDER = "dit_accel.kernels.sla"
FUNCTIONS = {
    "state": "triton_forward:state_kernel",
    "forward": "triton_forward:sparse_linear_fwd_kernel",
    "dq": "triton_backward:sparse_linear_bwd_kernel_dq",
    "sums": "triton_backward:sums_kernel",
    "dkdv": "triton_backward:sparse_linear_bwd_kernel_dkdv",
}
FORWARD = ("state",)
CUTS = {64: (1, 8, 8), 128: (2, 8, 8)}  # tokens of a block, and its tile
BLOCKS = ((64, 64), (128, 64), (128, 128))  # queries x keys
ROUTES = Routes("*i32", "*i32", "i32", "i32", "i32")
SELECTING = Selecting(*["*i32"] * 8)
LAYOUT = TokenLayout(SIDE, SIDE, SegmentRows("i32", "i32", "i32", "*i32"))
SAVED = SavedBranches("data", "*fp32", "data", "*fp32", "*i32", "i32")
TABLE = StateTable("data", "*fp32", "*fp32")
FLOATS = ("means", "states", "totals", "bias", "inverses", "ratios", "dstates", "dtotals", "dbias")
POINTERS = (
    *((name, HEADS) for name in ("q", "k", "v", "grad_out", "pulled", "exact")),
    *((name, "data") for name in ("weight", "out", "dq", "dk", "dv")),
    *((name, "*fp32") for name in FLOATS),
    *((name, TABLE) for name in ("state", "gradient")),
    ("statistics", Statistics("*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*i32")),
    ("lists", Lists("*i32", "*i32", "*i64", "i32", "i32")),
    ("routes", ROUTES),
    ("selecting", SELECTING),
    ("saved", SAVED),
    ("layout", LAYOUT),
    ("keys", SIDE),
    ("scale", "fp32"),
)


def builds(arch: int) -> Iterator[Build]:
    """Every candidate of every kernel for each head dimension; the linear branch with its default map."""
    for head_dim in configs.HEAD_DIMS:
        for kernel, function in FUNCTIONS.items():
            for sizes in _constants(kernel, head_dim, arch):
                for launch in configs.fitting(kernel, sizes, itemsize=2, capability=arch):
                    yield Build(
                        kernel=f"sla_{kernel}_forward" if kernel in FORWARD else f"sla_{kernel}",
                        function=f"{FOLDER}.{function}",
                        constants=tuple({**sizes, "STEP": launch.step}.items()),
                        pointers=POINTERS,
                        warps=launch.warps,
                        stages=launch.stages,
                        needs=configs.shared_bytes(kernel, launch, sizes, itemsize=2, capability=arch),
                    )


def _constants(kernel: str, head_dim: int, arch: int) -> Iterator[dict[str, Any]]:
    """The launcher's compile-time constants save STEP: once for each block size and scope."""
    sizes: dict[str, Any] = {"D": head_dim, "BLOCK_D": head_dim, "ALIGN": 8}
    linear = {**sizes, "MAP": "softmax"}
    if kernel == "sums":
        yield {**linear, "SPLIT": configs.SPLIT}
    elif kernel in configs.FUSED:
        for queries, keys in BLOCKS:
            cuts = _cut(queries, "_Q") | _cut(keys, "_K")
            yield from (
                _fused(kernel, {**linear, **cuts, "SCOPE": scope}, arch) for scope in _scopes(max(queries, keys))
            )
    else:
        for block in CUTS:
            yield {**linear, **_cut(block), "SPLIT": configs.SPLIT // block}


def _cut(block: int, side: str = "") -> dict[str, Any]:
    return {f"BLOCK{side}": block, f"TILE{side}": CUTS[block]}


def _fused(kernel: str, sizes: dict[str, Any], arch: int) -> dict[str, Any]:
    if kernel == "forward":
        return {**sizes, "HAS_BIAS": True}
    return {**sizes, "ROWS": configs.key_rows(sizes, arch)} if kernel == "dkdv" else sizes


def _scopes(block: int) -> Iterator[str]:
    """Those that have kernels for blocks of that size."""
    return (scope for scope in LINEAR_SCOPES if scope == "all" or block <= configs.MARGINAL_BLOCK)
