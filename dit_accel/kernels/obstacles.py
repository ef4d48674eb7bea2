"""The facts of a call that are known before it runs, and what each implementation cannot do by them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.triton_configs import LARGEST_BLOCK, SHARED_BYTES, fitting
from dit_accel.order import TokenOrder

GROUP = 64  # pseudo-keys for which one program of the tail sums gradients, and most that a step takes
GRADIENTS = "dq", "dkdv"  # kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a call that are known before it runs.

    Args:
        device, dtype, head_dim: of q, k and v.
        block_q, block_k: tokens in a query block and in a key block.
        gradients: gradients of q, k or v follow.
        lse: the log-sum-exp is wanted.
        visual_blocks: of kernel "router": key blocks of visual tokens.
        by_number: of kernel "router": as in `router.rule.Rule`.
        linear_scope, feature_map: of kernel "sla": the blocks and the map of its linear branch; None without one.
        critical: of kernel "sla": blocks that a query block attends exactly; None if not known.
        capability: compute capability of a GPU that need not be present, 90 for 9.0; None: that of the device.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int = 64
    block_k: int = 64
    gradients: bool = False
    lse: bool = False
    visual_blocks: int = 0
    by_number: bool = False
    linear_scope: str | None = None
    feature_map: str | None = None
    critical: int | None = None
    capability: int | None = None

    @property
    def arch(self) -> int | None:
        """The compute capability of the GPU, 90 for 9.0; None if it is no CUDA device of NVIDIA."""
        here = self.capability is None and self.device.type == "cuda" and not torch.version.hip
        if not here or not torch.cuda.is_available():
            return self.capability
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        query_order: TokenOrder,
        key_order: TokenOrder,
        **more: Any,
    ) -> Facts:
        """The facts of a call whose sequence is cut into these blocks; `more` are further fields."""
        blocks = query_order.block, key_order.block
        return cls(device, dtype, head_dim, *blocks, visual_blocks=key_order.visual_blocks, **more)


def capability_of(gpu: str) -> int:
    """The compute capability in a name such as "sm_90".

    Raises:
        DitAccelError: no kernel is compiled for it.
    """
    known = {f"sm_{capability}": capability for capability in SHARED_BYTES}
    if gpu not in known:
        raise DitAccelError(f"gpu is one of {', '.join(known)}, got {gpu!r}.")
    return known[gpu]


def nothing(facts: Facts) -> str | None:
    """No call is refused."""
    return None


def triton(facts: Facts) -> str | None:
    for side, block in (("query", facts.block_q), ("key", facts.block_k)):
        if not 16 <= block <= LARGEST_BLOCK or block & (block - 1):
            return f"the kernels take {side} blocks of 16, 32, 64 or 128 tokens, not {block}"
    if INTERPRETED and facts.capability is None:
        return "Triton's interpreter has no bfloat16 arithmetic" if facts.dtype == torch.bfloat16 else None
    if facts.device.type != "cuda":
        return f"the tensors are on {facts.device}; Triton needs a CUDA device or TRITON_INTERPRET=1"
    return None


def attention_triton(facts: Facts) -> str | None:
    return triton(facts) or _without_room(facts, "forward", *(GRADIENTS if facts.gradients else ()))


def _without_room(facts: Facts, *kernels: str, fit: Callable[..., Sequence[Any]] = fitting) -> str | None:
    """Which of some kernels does not fit the shared memory of the GPU: `fit` has no launch for it."""
    if facts.arch is None:
        return None
    sizes = facts.block_q, facts.block_k, max(16, 1 << (facts.head_dim - 1).bit_length())
    for kernel in kernels:
        if not fit(kernel, *sizes, facts.dtype.itemsize, facts.arch):
            return (
                f"the {kernel} kernel for blocks of {sizes[0]} x {sizes[1]}, head dimension {facts.head_dim} and "
                f"{facts.dtype} needs more shared memory than sm_{facts.arch} has"
            )
    return None


def tail_gradients(facts: Facts) -> str | None:
    """Beside what attention needs: its gradients take groups of pseudo-keys, whatever a block's tokens."""
    return _without_room(dataclasses.replace(facts, block_k=GROUP), *GRADIENTS) if facts.gradients else None


def tail_alone(facts: Facts) -> str | None:
    """It is attention without a listed block."""
    return attention_triton(facts) or tail_gradients(facts)


def triton8(facts: Facts) -> str | None:
    if facts.gradients:
        return "the kernel has no gradients, for it rounds q and k to 8 bits"
    if facts.arch is not None and facts.arch < 80:
        return f"the kernel needs a GPU of compute capability 8.0 or higher, and this is sm_{facts.arch}"
    return triton(facts)


def gluon(facts: Facts) -> str | None:
    if facts.block_q != 128 or facts.block_k not in (64, 128):
        return f"the kernel takes blocks of 128 queries and 64 or 128 keys, not {facts.block_q} and {facts.block_k}"
    if facts.head_dim not in (64, 128):
        return f"the kernel takes head dimensions 64 and 128, not {facts.head_dim}"
    return hopper(facts)


def hopper(facts: Facts) -> str | None:
    if facts.arch != 90:
        where = f"the tensors are on {facts.device}" if facts.arch is None else f"this is sm_{facts.arch}"
        return f"the kernel needs a GPU of compute capability 9.0, and {where}"
    return None


def cudnn(facts: Facts) -> str | None:
    sizes = facts.block_q, facts.block_k
    if sizes not in ((64, 64), (128, 128)) or facts.head_dim not in (64, 96, 128):
        return (
            "cuDNN takes blocks of 64x64 or 128x128 tokens and head dimensions 64, 96 and 128, not "
            f"{sizes[0]}x{sizes[1]} and {facts.head_dim}"
        )
    if facts.gradients and (facts.dtype != torch.bfloat16 or facts.head_dim != 128 or facts.lse):
        return "cuDNN has gradients in bfloat16 with head dimension 128 alone, and none through the log-sum-exp"
    return hopper(facts)


def flex(facts: Facts) -> str | None:
    kind = facts.device.type
    for block in (facts.block_q, facts.block_k):
        if 128 % block and block % 128:
            return f"PyTorch's FlexAttention takes blocks that divide 128 or are a multiple of it, not {block}"
    if kind not in ("cuda", "cpu", "xpu", "hpu", "mps"):
        return f"PyTorch's FlexAttention does not run on {kind}"
    if kind in ("cpu", "mps") and (facts.gradients or facts.lse):
        return f"PyTorch's FlexAttention has no {'gradients' if facts.gradients else 'log-sum-exp'} on {kind}"
    if kind == "cpu" and torch.compiler.is_compiling():
        return "PyTorch's FlexAttention does not compile inside a compiled model on a CPU; it compiles by itself"
    return None


def sla_triton(facts: Facts) -> str | None:
    from dit_accel.kernels.sla import triton_configs

    def fit(kernel: str, block_q: int, block_k: int, block_d: int, *gpu: int) -> Sequence[Any]:
        scope = facts.linear_scope or "all"
        rows = min(block_q, triton_configs.MARGINAL_BLOCK) if scope == "marginal" else block_q
        sizes = {"BLOCK_Q": rows, "BLOCK_K": block_k, "BLOCK_D": block_d, "SCOPE": scope}
        return triton_configs.fitting(kernel, sizes, *gpu)

    sizes = facts.head_dim, facts.block_q, facts.block_k
    obstacle = triton_configs.unsupported(*sizes, facts.linear_scope, facts.feature_map) or triton(facts)
    return obstacle or _without_room(facts, "forward", *(GRADIENTS if facts.gradients else ()), fit=fit)


def router_triton(facts: Facts) -> str | None:
    from dit_accel.kernels.router.triton_configs import unsupported

    # a side whose blocks are single vectors is not pooled, so the limits of a block do not count there
    pooled: dict[str, Any] = {side: 16 for side in ("block_q", "block_k") if getattr(facts, side) == 1}
    obstacle = unsupported(facts.head_dim, facts.visual_blocks, facts.by_number)
    return obstacle or triton(dataclasses.replace(facts, **pooled))


def sla_gluon(facts: Facts) -> str | None:
    if facts.linear_scope == "marginal":
        return "the kernel computes linear_scope 'all', not 'marginal'"
    if facts.critical == 0:
        return "the kernel was not tried without critical blocks"
    return sla_triton(facts) or gluon(facts)
