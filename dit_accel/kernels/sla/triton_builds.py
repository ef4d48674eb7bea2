"""What `kernels.ahead_of_time` compiles of this folder: the launches of `triton_configs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dit_accel.kernels.ahead_of_time import Build
from dit_accel.kernels.sla import triton_configs as configs

FOLDER = "dit_accel.kernels.sla"
LINEAR = {
    "state": "triton_linear:state_kernel",
    "apply": "triton_linear:apply_kernel",
    "state_backward": "triton_linear_backward:state_backward_kernel",
    "apply_backward": "triton_linear_backward:apply_backward_kernel",
    "sums": "triton_linear_backward:sums_kernel",
}
MARGINAL = {
    "marginal": "triton_marginal:marginal_kernel",
    "marginal_dq": "triton_marginal_backward:marginal_dq_kernel",
    "marginal_dkdv": "triton_marginal_backward:marginal_dkdv_kernel",
}
FORWARD = ("state", "apply", "marginal")
TILE = (1, 8, 8)
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
    """Every kernel for each head dimension; the linear branch with its default map, the selection at two widths."""
    for head_dim in configs.HEAD_DIMS:
        sizes = {"D": head_dim, "BLOCK_D": head_dim}
        tiles = dict(zip(("TILE_T", "TILE_H", "TILE_W"), TILE, strict=True))
        means = {**sizes, "ALIGN": 8, "BLOCK": 64, **tiles}
        yield _build("sla_means_forward", "triton_router:block_means_kernel", means, configs.MEANS, 0, dots=False)
        for blocks in (512, 2048):
            width, launch = configs.selection(blocks)
            select = {"D": head_dim, "ROWS": launch.rows, "WIDTH": width, "HAS_SKIPPED": True}
            yield _build("sla_select_forward", "triton_router:select_kernel", select, launch, 0, dots=False)
        for kernel, function in MARGINAL.items():
            launch = configs.marginal(64, head_dim, itemsize=2, capability=arch)
            constants = {**means, "MAP": "softmax", "PRECISION": "ieee"}
            name = f"sla_{kernel}_forward" if kernel in FORWARD else f"sla_{kernel}"
            yield _build(name, function, constants, launch, configs.marginal_shared_bytes(64, launch, head_dim, 2))
        for kernel, function in LINEAR.items():
            launch = configs.linear(kernel, head_dim, itemsize=2)
            constants = {
                **sizes, "ALIGN": 8, "ROWS": launch.rows, "SPLIT": configs.SPLIT, "MAP": "softmax",
                "HAS_BIAS": True, "PRECISION": "ieee",
            }  # fmt: skip
            name = f"sla_{kernel}_forward" if kernel in FORWARD else f"sla_{kernel}"
            yield _build(name, function, constants, launch, configs.shared_bytes(kernel, launch, head_dim, itemsize=2))


def _build(
    kernel: str, function: str, constants: dict[str, Any], launch: configs.Launch, needs: int, dots: bool = True
) -> Build:
    return Build(
        kernel=kernel, function=f"{FOLDER}.{function}", constants=tuple(constants.items()), pointers=POINTERS,
        warps=launch.warps, stages=launch.stages, needs=needs, dots=dots,
    )  # fmt: skip
