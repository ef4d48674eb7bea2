"""The builds of the tail: the launches of the engine; of the gradients with pseudo-keys as its keys."""

from __future__ import annotations

from collections.abc import Iterator

from dit_accel.kernels.block_sparse.triton_configs import Launch, fitting, shared_bytes
from dit_accel.kernels.records import Lists, PseudoKeys
from dit_accel.kernels.tail.triton import GROUP, MEANS, OUTSIDE
from tools.kernels.ahead_of_time import Build
from tools.kernels.block_sparse import BLOCKS, HEAD_DIMS, HEADS, SAMPLES, SIDE, TILES

FOLDER = "dit_accel.kernels.tail.triton_kernels"
FUNCTIONS = {"forward": "tail_fwd_kernel", "dq": "tail_bwd_kernel_dq", "dkdv": "tail_bwd_kernel_dkdv"}
GRADIENTS = ("dq", "dkdv")
POINTERS = (
    *((name, HEADS) for name in ("q", "k", "v", "grad_out")),
    *((name, "data") for name in ("out", "dq", "pseudo_k", "pseudo_v")),
    *((name, "*fp32") for name in ("lse", "share", "grad_lse", "delta", "dk", "dv")),
    *((name, SIDE) for name in ("keys", "queries")),
    *((name, "*i32") for name in ("indices", "counts")),
    ("pseudo", PseudoKeys("data", "data", "*fp32", "*u8", "i32")),
    ("outside", "*u8"),
    ("lists", Lists("*i32", "*i32", "*i64", "i32", "i32")),
    ("samples", SAMPLES),
    ("scale", "fp32"),
)


def builds(arch: int) -> Iterator[Build]:
    """Every kernel for every size of blocks and every head dimension, in tile order."""
    yield _build("outside_forward", "outside_kernel", {"STEP": OUTSIDE.step}, OUTSIDE)
    for head_dim in HEAD_DIMS:
        sizes = {"D": head_dim, "BLOCK_D": head_dim, "ALIGN": 8}
        for block in TILES:
            yield _build("pseudo_forward", "pseudo_keys_kernel", {**sizes, **_cut("K", block)}, MEANS)
        for block_q, block_k in BLOCKS:
            for launch in fitting("forward", block_q, block_k, head_dim, 2, arch):
                needs = shared_bytes("forward", launch, block_q, block_k, head_dim, 2, arch)
                for share in (False, True):
                    constants = {**sizes, **_cut("Q", block_q), **_cut("K", block_k), "STEP": launch.step}
                    constants |= {"HAS_SHARE": share}
                    yield _build("forward", FUNCTIONS["forward"], constants, launch, needs)
        for kernel in GRADIENTS:
            for block in TILES:
                for launch in fitting(kernel, block, GROUP, head_dim, 2, arch):
                    constants = {
                        **sizes,
                        **_cut("Q", block),
                        "BLOCK_K": GROUP,
                        "STEP": launch.step,
                    }
                    needs = shared_bytes(kernel, launch, block, GROUP, head_dim, 2, arch)
                    yield _build(kernel, FUNCTIONS[kernel], constants, launch, needs)


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
