"""The implementations of the kernels as data: what each can do, where its code is, and which one a call gets.

A new back end is one module and one row of `ROWS`; code outside the package calls `add`. Nothing else in the package
compares the name of an implementation: `choose` decides once per call, and its row is handed down.

A module of kernel "block_sparse" has these functions, on the records of `block_sparse.geometry`::

    forward(q, k, v, lists, segments, geometry, scale) -> out, lse
    backward(grad_out, grad_lse, q, k, v, out, lse, lists, segments, geometry, scale) -> dq, dk, dv

q [B, H, Nq, D] and k, v [B, H, Nk, D] have any strides; `grad_lse` may be None. Results lie in memory as [B, N, H, D].
`lse` [B, H, Nq] is the natural logarithm, fp32 (fp64 for fp64); a row without keys has output 0 and LSE -inf. They run
in a custom op and must not return an input or a view of one. With `autograd` there is no `backward`: `forward` is
PyTorch code that PyTorch differentiates, and runs outside the op; where it cannot give an LSE, that is None.

A module of kernel "sla" has these functions, on the records of `sla.call`, both for the visual queries::

    route(q, k, cut, topk, skip) -> critical, negligible
    forward(q, k, v, topk, skip, call) -> out, critical

`forward` is differentiable in q, k, v and the projection. Its q, k and v are the whole sequence, those of `route` the
visual tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from dit_accel.errors import DitAccelError

Impl = str  # "auto" or the name of an implementation
AUTO: Impl = "auto"
BLOCK_SPARSE, SLA = "block_sparse", "sla"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
HALF = (torch.float16, torch.bfloat16)
_LOADED: dict[str, ModuleType] = {}
ELSEWHERE = ""  # the key of `Implementation.rank` for every other type of device


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a call before it runs.

    Args:
        device, dtype, head_dim: of q, k and v.
        block_q, block_k: tokens in a query block and in a key block.
        gradients: whether gradients of q, k or v will be wanted.
        lse: whether the log-sum-exp is wanted.
        visual_blocks: of kernel "sla": query blocks of visual tokens.
        linear_scope: of kernel "sla": which blocks its linear branch covers; None for a call without one.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_k: int
    gradients: bool = False
    lse: bool = False
    visual_blocks: int = 0
    linear_scope: str | None = None


def nothing(facts: Facts) -> str | None:
    """No call is refused."""
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of one kernel.

    Args:
        name: what `impl=` says.
        kernel: what it implements.
        module: where its functions are; imported when it first runs.
        rank: how "auto" ranks it on a type of device, or `ELSEWHERE`; the highest that can run the call is taken.
            Without a rank it runs only if it is named.
        dtypes: of q, k and v.
        head_dims: the largest head dimension.
        cannot: why it cannot run a call, or None if it can. Asked after packages, dtypes and head dimensions.
        package: what must be installed.
        packing: the module whose `pack(lists, geometry)` prepares lists that stay, for `BlockLists.packed`.
        autograd: PyTorch differentiates `forward`; see the module.
    """

    name: str
    kernel: str
    module: str
    rank: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (*HALF, torch.float32, torch.float64)
    head_dims: int | None = None
    cannot: Callable[[Facts], str | None] = nothing
    package: str | None = None
    packing: str | None = None
    autograd: bool = False
    installed: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        found = self.package is None or importlib.util.find_spec(self.package) is not None
        object.__setattr__(self, "installed", found)

    def obstacle(self, facts: Facts) -> str | None:
        """Why it cannot run a call, or None if it can."""
        if not self.installed:
            return f"the package {self.package} is not installed"
        if facts.dtype not in self.dtypes:
            known = ", ".join(_name(dtype) for dtype in self.dtypes)
            return f"{self.name} takes {known}, not {_name(facts.dtype)}"
        if self.head_dims is not None and facts.head_dim > self.head_dims:
            return f"{self.name} takes head dimensions up to {self.head_dims}, not {facts.head_dim}"
        return self.cannot(facts)

    def load(self) -> ModuleType:
        """Its module. A traced call can only take one that is loaded."""
        if self.module not in _LOADED:
            _LOADED[self.module] = importlib.import_module(self.module)
        return _LOADED[self.module]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton_device(facts: Facts) -> str | None:
    if INTERPRETED:
        return "Triton's interpreter has no bfloat16 arithmetic" if facts.dtype == torch.bfloat16 else None
    if facts.device.type != "cuda":
        return f"the tensors are on {facts.device}; Triton needs a CUDA device or TRITON_INTERPRET=1"
    return None


def _triton(facts: Facts) -> str | None:
    for side, block in (("query", facts.block_q), ("key", facts.block_k)):
        if not 16 <= block <= 128 or block & (block - 1):
            return f"the kernels take {side} blocks of 16, 32, 64 or 128 tokens, not {block}"
    return _triton_device(facts)


def _gluon(facts: Facts) -> str | None:
    if facts.block_q != 128 or facts.block_k not in (64, 128):
        return f"the kernel takes blocks of 128 queries and 64 or 128 keys, not {facts.block_q} and {facts.block_k}"
    if facts.head_dim not in (64, 128):
        return f"the kernel takes head dimensions 64 and 128, not {facts.head_dim}"
    if facts.device.type != "cuda" or torch.cuda.get_device_capability(facts.device) != (9, 0):
        return f"the tensors are on {facts.device}; the kernel needs a GPU of compute capability 9.0"
    return None


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

    return unsupported(facts.head_dim, facts.block_k, facts.visual_blocks, facts.linear_scope) or _triton(facts)


_FOLDER = "dit_accel.kernels"
_SINGLE = (*HALF, torch.float32)
ROWS = (
    Implementation("reference", BLOCK_SPARSE, f"{_FOLDER}.block_sparse.reference", autograd=True),
    Implementation("portable", BLOCK_SPARSE, f"{_FOLDER}.block_sparse.portable", rank={ELSEWHERE: 10}),
    Implementation(
        "triton",
        BLOCK_SPARSE,
        f"{_FOLDER}.block_sparse.triton",
        rank={"cuda": 20},
        dtypes=_SINGLE,
        head_dims=256,
        cannot=_triton,
        package="triton",
        packing=f"{_FOLDER}.block_sparse.triton_lists",
    ),
    # No GPU has run it yet. Once a row of benchmarks/results shows it faster than triton, rank={"cuda": 30} lets "auto"
    # take it where it can run. Its backward is Triton's, on the same lists.
    Implementation(
        "gluon",
        BLOCK_SPARSE,
        f"{_FOLDER}.block_sparse.gluon",
        dtypes=HALF,
        cannot=_gluon,
        package="triton",
        packing=f"{_FOLDER}.block_sparse.triton_lists",
    ),
    Implementation(
        "flex",
        BLOCK_SPARSE,
        f"{_FOLDER}.block_sparse.flex",
        rank={ELSEWHERE: 5},
        dtypes=_SINGLE,
        cannot=_flex,
        packing=f"{_FOLDER}.block_sparse.flex",
        autograd=True,
    ),
    Implementation("reference", SLA, f"{_FOLDER}.sla.reference"),
    Implementation("portable", SLA, f"{_FOLDER}.sla.portable", rank={ELSEWHERE: 10}),
    Implementation(
        "triton",
        SLA,
        f"{_FOLDER}.sla.ops",
        rank={"cuda": 20},
        dtypes=_SINGLE,
        head_dims=256,
        cannot=_sla_triton,
        package="triton",
    ),
)
_TABLE: dict[tuple[str, str], Implementation] = {(row.kernel, row.name): row for row in ROWS}


def add(row: Implementation) -> None:
    """Make an implementation known, so that `impl=` and "auto" find it.

    Raises:
        DitAccelError: the kernel has one of that name, or the name is "auto".
    """
    if row.name == AUTO or (row.kernel, row.name) in _TABLE:
        raise DitAccelError(f"Kernel {row.kernel} has an implementation {row.name!r} already; choose another name.")
    _TABLE[row.kernel, row.name] = row


def names(kernel: str = BLOCK_SPARSE) -> tuple[str, ...]:
    """What `impl=` may be."""
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
            f"impl={name!r} needs the package {row.package}, which is not installed: pip install {row.package}, or use "
            "impl='auto'."
        )
    return row


def check(impl: Impl) -> None:
    """Refuse a name that no implementation has, or one whose package is not installed.

    Raises:
        DitAccelError: it is so.
    """
    if impl != AUTO:
        named(impl)


def choose(facts: Facts, impl: Impl = AUTO, kernel: str = BLOCK_SPARSE) -> tuple[Implementation, str]:
    """The implementation that runs a call, and why.

    All implementations of a kernel compute the same masked result, so "auto" looks only for speed. A named one is
    never replaced by another.

    Returns:
        The row, and the reason as a sentence fit for a report.

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
            return row, obstacles[0] if obstacles else f"the fastest on {facts.device.type}"
        obstacles.append(obstacle)
    raise DitAccelError(f"No implementation can compute this on {facts.device}: {'; '.join(obstacles)}.")


def ranked(device_type: str, kernel: str = BLOCK_SPARSE) -> list[Implementation]:
    """What "auto" may take on a type of device, best first."""
    found: list[tuple[int, int, Implementation]] = []
    for row in _TABLE.values():
        rank = row.rank.get(device_type, row.rank.get(ELSEWHERE))
        if row.kernel == kernel and rank is not None:
            found.append((-rank, len(found), row))
    return [row for _, _, row in sorted(found, key=lambda item: item[:2])]
