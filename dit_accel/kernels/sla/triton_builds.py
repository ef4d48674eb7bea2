"""What `kernels.ahead_of_time` compiles of this folder: the launches of `triton_configs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.ahead_of_time import Build
from dit_accel.kernels.sla import triton_configs as configs

FOLDER = "dit_accel.kernels.sla"
FUNCTIONS = {
    "means": "triton_router:block_means_kernel",
    "select": "triton_router:select_kernel",
    "state": "triton_linear:state_kernel",
    "apply": "triton_linear:apply_kernel",
    "state_backward": "triton_linear_backward:state_backward_kernel",
    "apply_backward": "triton_linear_backward:apply_backward_kernel",
    "sums": "triton_linear_backward:sums_kernel",
    "marginal": "triton_marginal:marginal_kernel",
    "marginal_dq": "triton_marginal_backward:marginal_dq_kernel",
    "marginal_dkdv": "triton_marginal_backward:marginal_dkdv_kernel",
}
FORWARD = ("means", "select", "state", "apply", "marginal")
DOTLESS = ("means", "select")
BLOCK = 64
CUT = {"BLOCK": BLOCK, "TILE_T": 1, "TILE_H": 8, "TILE_W": 8}
WIDTHS = (512, 2048)  # rows of scores at 32,760 and at 75,600 tokens
DATA = ("q", "k", "v", "x", "exact", "grad_out", "out", "dq", "dk", "dv", "table")
FLOATS = (
    *("means", "query_means", "key_means", "states", "totals", "peaks", "bias"),
    *("dstates", "dtotals", "dbias", "inverses", "ratios", "denominators"),
)
POINTERS = (
    *((name, "data") for name in DATA),
    *((name, "*fp32") for name in FLOATS),
    *((name, "*i32") for name in ("kept", "dropped", "modes", "entries", "firsts", "singles", "n_singles")),
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
                        needs=configs.shared_bytes(kernel, launch, sizes, itemsize=2),
                        dots=kernel not in DOTLESS,
                    )


def _constants(kernel: str, head_dim: int, arch: int) -> Iterator[dict[str, Any]]:
    """The launcher's compile-time constants save STEP, once for each width of the selection."""
    if kernel == "select":
        yield from ({"D": head_dim, "WIDTH": width, "HAS_SKIPPED": True} for width in WIDTHS)
        return
    sizes: dict[str, Any] = {"D": head_dim, "BLOCK_D": head_dim, "ALIGN": 8}
    if kernel == "means":
        yield {**sizes, **CUT}
        return
    sizes |= {"MAP": "softmax", "PRECISION": "ieee"}
    if kernel == "state":
        sizes |= {**CUT, "SPLIT": configs.SPLIT // BLOCK}
    elif kernel == "sums":
        sizes |= {"SPLIT": configs.SPLIT}
    elif kernel == "apply":
        sizes |= {"HAS_BIAS": True}
    elif kernel.startswith("marginal"):
        sizes |= CUT
    if kernel == "marginal_dkdv":
        sizes |= {"ROWS": configs.key_rows(BLOCK, head_dim, arch)}
    yield sizes
