"""The implementations of the kernels as data, and the choice among them for a call.

A new back end is one module and one row of `ROWS`; code outside the package calls `add`. No other code compares the
name of an implementation: `choose` decides once per call, and passes its row on.

A module of kernel "block_sparse" has these functions, on `block_sparse.geometry.BlockSparseCall`::

    forward(call) -> out, lse
    backward(grad_out, grad_lse, out, lse, call) -> dq, dk, dv

`grad_lse` may be None. Results are [B, N, H, D] in memory. `lse` [B, H, Nq] is the natural logarithm, fp32 (fp64 for
fp64); a row without keys has output 0 and LSE -inf. Both run in a custom op and must not return an input or a view of
one. With `autograd` there is no `backward`: `forward` is code that PyTorch differentiates, outside the op, and its LSE
may be None.

A module of kernel "router" has this function, on the records of `router.call`::

    route(q, k, call) -> indices, counts, worst

A module of kernel "sla" has this function, on the record of `sla.call`, for the visual queries of a whole sequence. It
is differentiable in q, k, v and the projection::

    forward(q, k, v, topk, skip, call) -> out, critical

A module of kernel "tail" has these functions, on the record of `tail.call`; see `tail.api.with_tail`::

    forward(call) -> out, lse
    backward(grad_out, grad_lse, out, lse, call) -> dq, dk, dv, dexact, dexact_lse
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.order import TokenOrder

Impl = str  # "auto" or the name of an implementation
AUTO: Impl = "auto"
BLOCK_SPARSE, ROUTER, SLA, TAIL = "block_sparse", "router", "sla", "tail"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
HALF = (torch.float16, torch.bfloat16)
_LOADED: dict[str, ModuleType] = {}
ELSEWHERE = ""  # the key of `Implementation.rank` for every other type of device


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a call that are known before it runs.

    Args:
        device, dtype, head_dim: of q, k and v.
        block_q, block_k: tokens in a query block and in a key block.
        gradients: gradients of q, k or v follow.
        lse: the log-sum-exp is wanted.
        visual_blocks: of kernel "router": key blocks of visual tokens.
        by_number: of kernel "router": as in `router.call.Rule`.
        linear_scope, feature_map: of kernel "sla": the blocks and the map of its linear branch; None without one.
        critical: of kernel "sla": blocks that a query block attends exactly; None if not known.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_k: int
    gradients: bool = False
    lse: bool = False
    visual_blocks: int = 0
    by_number: bool = False
    linear_scope: str | None = None
    feature_map: str | None = None
    critical: int | None = None

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


def nothing(facts: Facts) -> str | None:
    """No call is refused."""
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of one kernel.

    Args:
        name: the value of `impl=`.
        kernel: the kernel that it implements.
        module: of its functions; imported when it first runs. "": the module of that name in the kernel's folder.
        rank: its rank for "auto" by type of device or `ELSEWHERE`; the highest that can run the call is taken. Without
            a rank it runs only by name.
        dtypes: of q, k and v.
        head_dims: the largest head dimension.
        cannot: why it cannot run a call, or None if it can. Asked after packages, dtypes and head dimensions.
        package: a package that it needs; `wheel`: its name for pip where that is another.
        packing: the module whose `pack(lists, geometry)` makes `BlockLists.packed`.
        autograd: PyTorch differentiates `forward`; see the module.
    """

    name: str
    kernel: str
    module: str = ""
    rank: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (*HALF, torch.float32, torch.float64)
    head_dims: int | None = None
    cannot: Callable[[Facts], str | None] = nothing
    package: str | None = None
    wheel: str | None = None
    packing: str | None = None
    autograd: bool = False
    installed: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        found = self.package is None or importlib.util.find_spec(self.package) is not None
        object.__setattr__(self, "installed", found)
        object.__setattr__(self, "module", self.module or f"{__package__}.{self.kernel}.{self.name}")

    def obstacle(self, facts: Facts) -> str | None:
        """Why it cannot run a call, or None if it can."""
        if not self.installed:
            return f"the package {self.wheel or self.package} is not installed"
        if facts.dtype not in self.dtypes:
            known, came = ", ".join(map(str, self.dtypes)), str(facts.dtype)
            return f"{self.name} takes {known}, not {came}".replace("torch.", "")
        if self.head_dims is not None and facts.head_dim > self.head_dims:
            return f"{self.name} takes head dimensions up to {self.head_dims}, not {facts.head_dim}"
        return self.cannot(facts)

    def load(self) -> ModuleType:
        """Its module. A traced call needs it loaded already."""
        if self.module not in _LOADED:
            _LOADED[self.module] = importlib.import_module(self.module)
        return _LOADED[self.module]


def _triton(facts: Facts) -> str | None:
    for side, block in (("query", facts.block_q), ("key", facts.block_k)):
        if not 16 <= block <= 128 or block & (block - 1):
            return f"the kernels take {side} blocks of 16, 32, 64 or 128 tokens, not {block}"
    if INTERPRETED:
        return "Triton's interpreter has no bfloat16 arithmetic" if facts.dtype == torch.bfloat16 else None
    if facts.device.type != "cuda":
        return f"the tensors are on {facts.device}; Triton needs a CUDA device or TRITON_INTERPRET=1"
    return None


def _gluon(facts: Facts) -> str | None:
    if facts.block_q != 128 or facts.block_k not in (64, 128):
        return f"the kernel takes blocks of 128 queries and 64 or 128 keys, not {facts.block_q} and {facts.block_k}"
    if facts.head_dim not in (64, 128):
        return f"the kernel takes head dimensions 64 and 128, not {facts.head_dim}"
    return _hopper(facts)


def _hopper(facts: Facts) -> str | None:
    there = facts.device.type == "cuda" and torch.cuda.is_available()
    if not there or torch.cuda.get_device_capability(facts.device) != (9, 0):
        return f"the kernel needs a GPU of compute capability 9.0, and the tensors are on {facts.device}"
    return None


def _cudnn(facts: Facts) -> str | None:
    sizes = facts.block_q, facts.block_k
    if sizes not in ((64, 64), (128, 128)) or facts.head_dim not in (64, 96, 128):
        return (
            "cuDNN takes blocks of 64x64 or 128x128 tokens and head dimensions 64, 96 and 128, not "
            f"{sizes[0]}x{sizes[1]} and {facts.head_dim}"
        )
    if facts.gradients and (facts.dtype != torch.bfloat16 or facts.head_dim != 128 or facts.lse):
        return "cuDNN has gradients in bfloat16 with head dimension 128 alone, and none through the log-sum-exp"
    return _hopper(facts)


def _flex(facts: Facts) -> str | None:
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


def _sla_triton(facts: Facts) -> str | None:
    from dit_accel.kernels.sla.triton_configs import unsupported

    sizes = facts.head_dim, facts.block_q, facts.block_k
    return unsupported(*sizes, facts.linear_scope, facts.feature_map) or _triton(facts)


def _router_triton(facts: Facts) -> str | None:
    from dit_accel.kernels.router.triton_configs import unsupported

    # a side whose blocks are single vectors is not pooled, so the limits of a block do not count there
    pooled: dict[str, Any] = {side: 16 for side in ("block_q", "block_k") if getattr(facts, side) == 1}
    obstacle = unsupported(facts.head_dim, facts.visual_blocks, facts.by_number)
    return obstacle or _triton(dataclasses.replace(facts, **pooled))


def _sla_gluon(facts: Facts) -> str | None:
    if facts.linear_scope == "marginal":
        return "the kernel computes linear_scope 'all', not 'marginal'"
    if facts.critical == 0:
        return "the kernel was not tried without critical blocks"
    return _sla_triton(facts) or _gluon(facts)


def _reference(kernel: str, *, autograd: bool = False) -> Implementation:
    return Implementation("reference", kernel, autograd=autograd)


def _portable(kernel: str) -> Implementation:
    return Implementation("portable", kernel, rank={ELSEWHERE: 10})


def _of_triton(kernel: str, cannot: Callable[[Facts], str | None], **more: Any) -> Implementation:
    """A row of Triton kernels for CUDA; `more` are further fields."""
    fields: dict[str, Any] = {"rank": {"cuda": 20}, "dtypes": _SINGLE, "package": "triton", "cannot": cannot}
    return Implementation("triton", kernel, **(fields | more))


def _of_gluon(name: str, module: str, **more: Any) -> Implementation:
    fields: dict[str, Any] = {"dtypes": HALF, "cannot": _gluon, "package": "triton", "packing": _LISTS}
    return Implementation(name, BLOCK_SPARSE, f"{_GLUON}.{module}", **fields, **more)


_SINGLE = (*HALF, torch.float32)
_LISTS = "dit_accel.kernels.block_sparse.triton_lists"
_GLUON = "dit_accel.kernels.block_sparse.gluon"
_FLEX = "dit_accel.kernels.block_sparse.libraries.flex"
_CUDNN = "dit_accel.kernels.block_sparse.libraries.cudnn"
_SLA_OPS = "dit_accel.kernels.sla.ops"
ROWS = (
    _reference(BLOCK_SPARSE, autograd=True),
    _portable(BLOCK_SPARSE),
    _of_triton(BLOCK_SPARSE, _triton, head_dims=256, packing=_LISTS),
    # Its gradients were compiled and emulated. No GPU has run them yet, so "auto" takes the next row.
    _of_gluon("gluon", "launches"),
    # Faster than triton in the five settings of an H200 that have both (benchmarks/LOG.md); the gradients are Triton's.
    _of_gluon("gluon_triton", "with_triton", rank={"cuda": 30}),
    Implementation(
        "flex",
        BLOCK_SPARSE,
        _FLEX,
        rank={ELSEWHERE: 5},
        dtypes=_SINGLE,
        cannot=_flex,
        packing=_FLEX,
        autograd=True,
    ),
    # Its own name alone takes it, until a measured row shows that it is faster.
    Implementation(
        "cudnn", BLOCK_SPARSE, _CUDNN, dtypes=HALF, cannot=_cudnn, package="cudnn", wheel="nvidia-cudnn-frontend"
    ),
    _reference(ROUTER),
    _portable(ROUTER),
    _of_triton(ROUTER, _router_triton),
    _reference(SLA),
    _portable(SLA),
    _of_triton(SLA, _sla_triton, head_dims=256, module=_SLA_OPS),
    # No GPU has run it yet; see "gluon" above.
    Implementation("gluon", SLA, _SLA_OPS, dtypes=HALF, head_dims=128, cannot=_sla_gluon, package="triton"),
    _reference(TAIL, autograd=True),
    _portable(TAIL),
    _of_triton(TAIL, _triton, head_dims=256),
)
_TABLE: dict[tuple[str, str], Implementation] = {(row.kernel, row.name): row for row in ROWS}


def add(row: Implementation) -> None:
    """Add an implementation for `impl=` and "auto", under a new name."""
    if row.name == AUTO or (row.kernel, row.name) in _TABLE:
        raise DitAccelError(f"Kernel {row.kernel} has an implementation {row.name!r} already. Choose another name.")
    _TABLE[row.kernel, row.name] = row


def rows() -> tuple[Implementation, ...]:
    """Every implementation of every kernel."""
    return tuple(_TABLE.values())


def names(kernel: str = BLOCK_SPARSE) -> tuple[str, ...]:
    """The values of `impl=`."""
    return AUTO, *(row.name for row in _TABLE.values() if row.kernel == kernel)


def named(name: str, kernel: str = BLOCK_SPARSE) -> Implementation:
    """The implementation of that name.

    Raises:
        DitAccelError: there is none, or it needs a package that is not installed.
    """
    if (kernel, name) not in _TABLE:
        raise DitAccelError(f"impl must be one of {', '.join(names(kernel))}, got {name!r}.")
    row = _TABLE[kernel, name]
    if not row.installed:
        raise DitAccelError(
            f"impl={name!r} needs the package {row.wheel or row.package}, which is not installed: pip install "
            f"{row.wheel or row.package}, or use impl='auto'."
        )
    return row


def check(impl: Impl) -> None:
    """Refuse an unknown name, and one whose package is not installed."""
    if impl != AUTO:
        named(impl)


def choose(facts: Facts, impl: Impl = AUTO, kernel: str = BLOCK_SPARSE) -> tuple[Implementation, str]:
    """The implementation that runs a call, and the reason, for a report.

    All implementations of a kernel compute the same masked result, so "auto" looks only for speed. A named one is
    never replaced by another.

    Raises:
        DitAccelError: the name is unknown, or the named implementation cannot run the call.
    """
    if impl != AUTO:
        row = named(impl, kernel)
        obstacle = row.obstacle(facts)
        if obstacle is not None:
            raise DitAccelError(f"impl={impl!r} cannot compute this: {obstacle}. Use impl='auto' or another name.")
        return row, f"impl={impl!r} was asked for"
    obstacles: list[str] = []
    for row in ranked(facts.device.type, kernel):
        obstacle = row.obstacle(facts)
        if obstacle is None:
            return row, obstacles[-1] if obstacles else f"the fastest on {facts.device.type}"
        obstacles.append(obstacle)
    raise DitAccelError(f"No implementation can compute this on {facts.device}: {'; '.join(obstacles)}.")


def ranked(device_type: str, kernel: str = BLOCK_SPARSE) -> list[Implementation]:
    """The implementations that "auto" may take on a type of device, best first."""
    ranks = [
        (row, row.rank.get(device_type, row.rank.get(ELSEWHERE))) for row in _TABLE.values() if row.kernel == kernel
    ]
    found = [(row, rank) for row, rank in ranks if rank is not None]
    return [row for row, _ in sorted(found, key=lambda item: -item[1])]
