"""The builds of the tail: the launches of the engine, with pseudo-keys as its keys."""

from __future__ import annotations

from collections.abc import Iterator

from dit_accel.kernels.block_sparse.triton_configs import Launch, fitting, shared_bytes
from dit_accel.kernels.tail.triton import GROUP, MEANS, OUTSIDE
from dit_accel.kernels.tail.triton_kernels import PseudoKeys
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import HEAD_DIMS, HEADS, SIDE, TILES

FOLDER = "dit_accel.kernels.tail.triton_kernels"
FUNCTIONS = {"forward": "tail_fwd_kernel", "dq": "tail_bwd_kernel_dq", "dkdv": "tail_bwd_kernel_dkdv"}
POINTERS = (
    *((name, HEADS) for name in ("q", "k", "v", "grad_out", "exact")),
    *((name, "data") for name in ("out", "dq", "dexact", "pseudo_k", "pseudo_v")),
    *((name, "*fp32") for name in ("exact_lse", "lse", "grad_lse", "dexact_lse", "delta", "dk", "dv")),
    *((name, SIDE) for name in ("keys", "queries")),
    *((name, "*i32") for name in ("indices", "counts")),
    ("pseudo", PseudoKeys("data", "data", "*fp32", "*u8", "i32")),
    ("outside", "*u8"),
    ("scale", "fp32"),
)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel for both sizes of query blocks and every head dimension, in tile order."""
    yield _build("outside_forward", "outside_kernel", {"STEP": OUTSIDE.step}, OUTSIDE)
    for head_dim in HEAD_DIMS:
        sizes = {"D": head_dim, "BLOCK_D": head_dim, "ALIGN": 8}
        yield _build("pseudo_forward", "pseudo_keys_kernel", {**sizes, **_cut("K", 64)}, MEANS)
        for kernel, function in FUNCTIONS.items():
            for block in TILES:
                for launch in fitting(kernel, block, GROUP, head_dim, 2, arch):
                    constants = {
                        **sizes,
                        **_cut("Q", block),
                        "BLOCK_K": GROUP,
                        "STEP": launch.step,
                    }
                    needs = shared_bytes(kernel, launch, block, GROUP, head_dim, 2, arch)
                    yield _build(kernel, function, constants, launch, needs)


def _build(kernel: str, function: str, constants: dict[str, object], launch: Launch, needs: int = 0) -> Build:
    return Build(
        kernel=f"tail_{kernel}",
        function=f"{FOLDER}:{function}",
        constants=tuple(constants.items()),
        pointers=(*POINTERS, ("out", HEADS)) if kernel == "dq" else POINTERS,
        warps=launch.warps,
        stages=launch.stages,
        needs=needs,
        dots=needs > 0,
    )


def _cut(side: str, block: int) -> dict[str, object]:
    return {f"BLOCK_{side}": block, f"TILE_{side}": TILES[block]}
