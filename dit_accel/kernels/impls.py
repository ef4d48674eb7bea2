"""The implementations of the kernels as data, and the choice among them for a call.

A new back end is one module and one row of `ROWS`; code outside the package calls `add`. No other code compares the
name of an implementation: `choose` decides once per call, and passes its row on.

A module of kernel "block_sparse" has these functions, on `block_sparse.geometry.BlockSparseInputs`::

    forward(call) -> out, lse
    backward(grad_out, grad_lse, out, lse, call) -> dq, dk, dv

`grad_lse` may be None. Results are [B, N, H, D] in memory. `lse` [B, H, Nq] is the natural logarithm, fp32 (fp64 for
fp64); a row without keys has output 0 and LSE -inf. Both run in a custom op and must not return an input or a view of
one. With `autograd` there is no `backward`: `forward` is code that PyTorch differentiates, outside the op, and its LSE
may be None.

A module of kernel "router" has these functions; `call` is a record of `router.rule`, `order` a `TokenOrder`::

    route(q, k, call) -> indices, counts, worst
    deviations(x, order) -> means, deviations

A module of kernel "sla" has this function, on the record of `sla.arguments`, for the visual queries of a sequence.
It is differentiable in q, k, v and the projection::

    forward(q, k, v, topk, skip, call) -> out, critical

An implementation of kernel "block_sparse" may have another module, `tail`, which computes attention with the tail in
one kernel, with these functions on a `tail.reference.TailedInputs`; see `tail.ops`::

    forward(call, cuts) -> out, lse, share
    parts_of(call, cuts) -> parts, whose `listed` is what this implementation's `backward` takes
    add_gradients(gradients, grad_out, grad_lse, out, lse, parts)

A module of kernel "tail" computes it beside an exact part, on a `tail.reference.TailInputs`; see `tail.api.with_tail`::

    forward(call) -> out, lse
    backward(grad_out, grad_lse, out, lse, call) -> dq, dk, dv, dexact, dexact_lse
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import obstacles
from dit_accel.kernels.block_sparse.triton_configs import LARGEST_BLOCK
from dit_accel.kernels.obstacles import Facts

Impl = str  # "auto" or the name of an implementation
AUTO: Impl = "auto"
BLOCK_SPARSE, ROUTER, SLA, TAIL = "block_sparse", "router", "sla", "tail"
HALF = (torch.float16, torch.bfloat16)
BLOCKS, HEAD_DIMS = (16, 32, 64, 128), (64, 128)  # that kernels take
_LOADED: dict[str, ModuleType] = {}
ELSEWHERE = ""  # the key of `Implementation.rank` for every other type of device


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of one kernel.

    Args:
        name: the value of `impl=`.
        kernel: the kernel that it implements.
        module: of its functions; imported when it first runs. "": the module of that name in the kernel's folder.
        gradients: the module of `backward`; "": the same.
        rank: its rank for "auto" by type of device or `ELSEWHERE`; the highest that can run the call is taken. Without
            a rank it runs only by name.
        dtypes: of q, k and v.
        head_dims: the largest head dimension.
        cannot: why it cannot run a call, or None if it can. Asked after packages, dtypes and head dimensions.
        cuts: the most tokens of a block by field of `Facts`. A larger block runs in halves of its halves, which keep
            its list; its number of tokens is a power of two.
        package: a package that it needs; `wheel`: its name for pip where that is another.
        packing: the module whose `pack(lists, geometry)` makes `BlockLists.packed`.
        autograd: PyTorch differentiates `forward`; see the module.
        tail: of kernel "block_sparse": the module that computes the tail in the same kernel; None if there is none.
        list_start: of kernel "block_sparse" with a program for each list: what a list takes beside its key blocks, in
            the time of a block of 64 keys. Few long lists are then attended in pieces. None: it has no such programs.
    """

    name: str
    kernel: str
    module: str = ""
    gradients: str = ""
    rank: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (*HALF, torch.float32, torch.float64)
    head_dims: int | None = None
    cannot: Callable[[Facts], str | None] = obstacles.nothing
    cuts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    package: str | None = None
    wheel: str | None = None
    packing: str | None = None
    autograd: bool = False
    tail: str | None = None
    list_start: float | None = None
    installed: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        installed = self.package is None or importlib.util.find_spec(self.package) is not None
        object.__setattr__(self, "installed", installed)
        object.__setattr__(self, "module", self.module or f"{__package__}.{self.kernel}.{self.name}")
        object.__setattr__(self, "gradients", self.gradients or self.module)

    def obstacle(self, facts: Facts) -> str | None:
        """Why it cannot run a call, or None if it can."""
        if not self.installed and facts.capability is None:
            return f"the package {self.wheel or self.package} is not installed"
        if facts.dtype not in self.dtypes:
            known, came = ", ".join(map(str, self.dtypes)), str(facts.dtype)
            return f"{self.name} takes {known}, not {came}".replace("torch.", "")
        if self.head_dims is not None and facts.head_dim > self.head_dims:
            return f"{self.name} takes head dimensions up to {self.head_dims}, not {facts.head_dim}"
        return self.cannot(dataclasses.replace(facts, **self.cut(facts)))

    def cut(self, facts: Facts) -> dict[str, Any]:
        """The sizes of the parts in which too large blocks run, by field of `Facts`; empty if none is too large."""
        blocks = {side: getattr(facts, side) for side, most in self.cuts.items() if getattr(facts, side) > most}
        return {side: self.cuts[side] for side, block in blocks.items() if not block & (block - 1)}

    def load(self) -> ModuleType:
        """Its module. A traced call needs it loaded already."""
        return _loaded(self.module)

    def load_gradients(self) -> ModuleType:
        """The module of its `backward`."""
        return _loaded(self.gradients)

    def takes_tail(self, facts: Facts) -> bool:
        """Whether it computes the tail in the kernel of a call that it can run."""
        return self.tail is not None and obstacles.tail_gradients(dataclasses.replace(facts, **self.cut(facts))) is None

    def load_tail(self) -> ModuleType:
        """The module of attention with the tail."""
        assert self.tail is not None, f"{self.name} does not take the tail"
        return _loaded(self.tail)


def _loaded(module: str) -> ModuleType:
    if module not in _LOADED:
        _LOADED[module] = importlib.import_module(module)
    return _LOADED[module]


def _reference(kernel: str, *, autograd: bool = False) -> Implementation:
    return Implementation("reference", kernel, autograd=autograd)


def _portable(kernel: str) -> Implementation:
    return Implementation("portable", kernel, rank={ELSEWHERE: 10})


def _of_triton(kernel: str, cannot: Callable[[Facts], str | None], **more: Any) -> Implementation:
    """A row of Triton kernels for CUDA; `more` are further fields."""
    fields: dict[str, Any] = {"rank": {"cuda": 20}, "dtypes": _SINGLE, "package": "triton", "cannot": cannot}
    return Implementation("triton", kernel, **(fields | more))


def _of_gluon(name: str, **more: Any) -> Implementation:
    fields: dict[str, Any] = {"dtypes": HALF, "cannot": obstacles.gluon, "package": "triton", "packing": _LISTS}
    fields |= {"tail": f"{__package__}.{TAIL}.gluon", "list_start": LOADED_EARLY}
    return Implementation(name, BLOCK_SPARSE, _GLUON, cuts=_BOTH, **fields, **more)


# Of rows of an H200: 8 us beside 1.85 us a step of 128 keys. A Gluon program loads its next list early: 3 us, a guess.
STARTED, LOADED_EARLY = 8, 3
_SINGLE = (*HALF, torch.float32)
_QUERIES = {"block_q": LARGEST_BLOCK}
_BOTH = {**_QUERIES, "block_k": LARGEST_BLOCK}
_LISTS = f"{__package__}.{BLOCK_SPARSE}.triton_lists"
_GLUON = f"{__package__}.{BLOCK_SPARSE}.gluon.launches"
_FLEX = f"{__package__}.{BLOCK_SPARSE}.libraries.flex"
_CUDNN = f"{__package__}.{BLOCK_SPARSE}.libraries.cudnn"
_SLA_OPS = f"{__package__}.{SLA}.ops"
ROWS = (
    _reference(BLOCK_SPARSE, autograd=True),
    _portable(BLOCK_SPARSE),
    _of_triton(
        BLOCK_SPARSE,
        obstacles.attention_triton,
        head_dims=256,
        packing=_LISTS,
        cuts=_BOTH,
        tail=f"{__package__}.{TAIL}.triton",
        list_start=STARTED,
    ),
    # Less exact than the others, so its own name alone takes it. No GPU has run it yet.
    Implementation(
        "triton8",
        BLOCK_SPARSE,
        dtypes=HALF,
        head_dims=128,
        cannot=obstacles.triton8,
        cuts=_BOTH,
        package="triton",
        packing=_LISTS,
        list_start=STARTED,
    ),
    # Its gradients were compiled and emulated. No GPU has run them yet, so "auto" takes the next row.
    _of_gluon("gluon"),
    # The gradients are Triton's. Its forward was faster than Triton's in the five settings of an H200 that have both.
    # That one had a program for each list; no GPU has run a program on each multiprocessor yet (benchmarks/LOG.md).
    _of_gluon("gluon_triton", gradients=f"{__package__}.{BLOCK_SPARSE}.triton", rank={"cuda": 30}),
    Implementation(
        "flex",
        BLOCK_SPARSE,
        _FLEX,
        rank={ELSEWHERE: 5},
        dtypes=_SINGLE,
        cannot=obstacles.flex,
        packing=_FLEX,
        autograd=True,
    ),
    # Its own name alone takes it, until a measured row shows that it is faster.
    Implementation(
        "cudnn",
        BLOCK_SPARSE,
        _CUDNN,
        dtypes=HALF,
        cannot=obstacles.cudnn,
        package="cudnn",
        wheel="nvidia-cudnn-frontend",
    ),
    _reference(ROUTER),
    _portable(ROUTER),
    _of_triton(ROUTER, obstacles.router_triton, cuts=_BOTH),
    _reference(SLA),
    _portable(SLA),
    _of_triton(SLA, obstacles.sla_triton, head_dims=256, module=_SLA_OPS, cuts=_QUERIES),
    # No GPU has run it yet; see "gluon" above.
    Implementation(
        "gluon", SLA, _SLA_OPS, dtypes=HALF, head_dims=128, cannot=obstacles.sla_gluon, cuts=_QUERIES, package="triton"
    ),
    _reference(TAIL, autograd=True),
    _portable(TAIL),
    # For attention that does not take the tail.
    _of_triton(
        TAIL, obstacles.tail_alone, head_dims=256, cuts=_BOTH, module=f"{__package__}.{TAIL}.ops", autograd=True
    ),
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


def beside(impl: Impl, facts: Facts, kernel: str) -> Impl:
    """The name for a call beside that of the visual queries, of another kernel or other blocks.

    It is the same name, or "auto" where that kernel has no such implementation, or it cannot run the call.
    """
    row = _TABLE.get((kernel, impl))
    return impl if row is not None and row.installed and row.obstacle(facts) is None else AUTO


def check(impl: Impl) -> None:
    """Refuse an unknown name, and one whose package is not installed."""
    if impl != AUTO:
        named(impl)


class Choice(NamedTuple):
    """What runs a part of a plan's calls.

    part: "attention", of visual queries; "text", of all other queries; "router"; "tail".
    kernel, name, why: the kernel, its implementation and the reason for it.
    plain: it is plain PyTorch on a GPU that has kernels.
    faster: what keeps the call from a faster implementation, and the nearest blocks that reach one, if any do; None if
        none is faster.
    """

    part: str
    kernel: str
    name: str
    why: str
    plain: bool = False
    faster: str | None = None


def explain(part: str, kernel: str, facts: Facts, impl: Impl, *, square: bool = False) -> Choice:
    """`choose`, with what would be faster; `square`: queries and keys have blocks of one size."""
    row, why = choose(facts, impl, kernel)
    above = list(itertools.takewhile(lambda other: other is not row, ranked(facts.device.type, kernel)))
    faster = None if impl != AUTO else next(filter(None, (_hindrance(better, facts, square) for better in above)), None)
    kind = facts.device.type
    plain = kind not in row.rank and any(kind in other.rank for other in ranked(kind, kernel))
    return Choice(part, kernel, row.name, why, plain, why if plain and impl == AUTO and faster is None else faster)


def _hindrance(row: Implementation, facts: Facts, square: bool) -> str | None:
    """Why an implementation for this GPU does not run a call, and the nearest blocks that it takes.

    None if no block and no head dimension reaches it, as on another GPU.
    """

    def far(blocks: tuple[int, int]) -> tuple[float, ...]:
        steps = math.log2(blocks[0] / facts.block_q), math.log2(blocks[1] / facts.block_k)
        return abs(steps[0]) + abs(steps[1]), -blocks[0], -blocks[1]

    def takes(block_q: int, block_k: int, **other: Any) -> bool:
        visual = -(-facts.visual_blocks * facts.block_k // block_k)
        others = dataclasses.replace(facts, block_q=block_q, block_k=block_k, visual_blocks=visual, **other)
        return row.obstacle(others) is None

    sizes = [block for block in itertools.product(BLOCKS, BLOCKS) if not square or block[0] == block[1]]
    sizes, obstacle = sorted(sizes, key=far), row.obstacle(facts)
    near = next((blocks for blocks in sizes if takes(*blocks)), None)
    if near is not None:
        return f"{obstacle}; with {'' if square else f'block_q={near[0]}, '}block={near[1]} {row.name} runs"
    reached = any(takes(*blocks, head_dim=head_dim) for blocks in sizes for head_dim in HEAD_DIMS)
    return f"{obstacle}; {row.name} runs with no other blocks" if reached else None


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
    reasons: list[str] = []
    for row in ranked(facts.device.type, kernel):
        obstacle = row.obstacle(facts)
        if obstacle is None:
            return row, reasons[-1] if reasons else f"the first choice on {facts.device.type}"
        reasons.append(obstacle)
    raise DitAccelError(f"No implementation can compute this on {facts.device}: {'; '.join(reasons)}.")


def only_named(facts: Facts, kernel: str = BLOCK_SPARSE) -> list[str]:
    """The implementations of other packages that can run a call, but that "auto" never takes on such a device."""
    left_out = [row for row in _TABLE.values() if row.kernel == kernel and row.package is not None]
    ranked_ones = ranked(facts.device.type, kernel)
    return [row.name for row in left_out if row not in ranked_ones and row.obstacle(facts) is None]


def ranked(device_type: str, kernel: str = BLOCK_SPARSE) -> list[Implementation]:
    """The implementations that "auto" may take on a type of device, best first."""
    ranks = [
        (row, row.rank.get(device_type, row.rank.get(ELSEWHERE))) for row in _TABLE.values() if row.kernel == kernel
    ]
    candidates = [(row, rank) for row, rank in ranks if rank is not None]
    return [row for row, _ in sorted(candidates, key=lambda item: -item[1])]
