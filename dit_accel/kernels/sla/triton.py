"""The Triton implementation: the router and the linear branch; critical blocks go through the block-sparse engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.block_sparse.triton_lists import transpose_lists
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.layout import Cut
from dit_accel.kernels.sla.triton_linear import apply_kernel, state_kernel
from dit_accel.kernels.sla.triton_linear_backward import apply_backward_kernel, state_backward_kernel, sums_kernel
from dit_accel.kernels.sla.triton_marginal import marginal_kernel
from dit_accel.kernels.sla.triton_marginal_backward import marginal_dkdv_kernel, marginal_dq_kernel
from dit_accel.kernels.sla.triton_router import block_means_kernel, select_kernel

JIT = {
    "means": block_means_kernel,
    "select": select_kernel,
    "state": state_kernel,
    "apply": apply_kernel,
    "state_backward": state_backward_kernel,
    "apply_backward": apply_backward_kernel,
    "sums": sums_kernel,
    "marginal": marginal_kernel,
    "marginal_dq": marginal_dq_kernel,
    "marginal_dkdv": marginal_dkdv_kernel,
}
INTERPRETED = isinstance(block_means_kernel, InterpretedFunction)


class Lists(NamedTuple):
    """What the router kept and dropped: int32 [B, H, blocks, *] each, ascending."""

    kept: torch.Tensor
    dropped: torch.Tensor

    @property
    def counts(self) -> tuple[int, int, int]:
        """Query blocks, and how many key blocks each keeps and drops."""
        return self.kept.shape[2], self.kept.shape[3], self.dropped.shape[3]


def block_means(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """See `ops.block_means`."""
    x = _rows(x)
    batch, heads, _, dim = x.shape
    means, align = _room_for_means(x, cut), _alignment(x)
    _run(
        "means", (cut.blocks, batch * heads),
        (x, means, *_strides(align, x), *cut.grid, heads),
        {**_head_dim(dim), "ALIGN": align, **_cut(cut)},
    )  # fmt: skip
    return means


def select(
    query_means: torch.Tensor, key_means: torch.Tensor, critical: int, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.select`."""
    batch, heads, dim, blocks = query_means.shape
    kept, dropped = (
        query_means.new_empty(batch, heads, blocks, n, dtype=torch.int32) for n in (critical, skipped)
    )  # fmt: skip
    _run(
        "select", _in_steps(blocks, batch * heads),
        (query_means, key_means, kept, dropped, blocks, critical, skipped),
        {"D": dim, "WIDTH": configs.width_of(blocks), "HAS_SKIPPED": skipped > 0},
    )  # fmt: skip
    return kept, dropped


def state(
    k: torch.Tensor, v: torch.Tensor, cut: Cut, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.state`."""
    k, v = _rows(k), _rows(v)
    batch, heads, _, dim = k.shape
    split = configs.SPLIT // cut.block
    splits, align, means = triton.cdiv(cut.blocks, split), _alignment(k, v), _room_for_means(k, cut)
    states = k.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    totals = k.new_empty(batch, heads, splits, dim, dtype=torch.float32)
    _run(
        "state", (splits, batch * heads),
        (k, v, states, totals, means, *_strides(align, k, v), *cut.grid, heads, cut.blocks),
        {**_linear(dim, align, feature_map), **_cut(cut), "SPLIT": split},
    )  # fmt: skip
    return states.sum(2), totals.sum(2), means


def state_backward(
    k: torch.Tensor, v: torch.Tensor, dstate: torch.Tensor, dtotal: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.state_backward`."""
    k, v = _rows(k), _rows(v)
    batch, heads, tokens, dim = k.shape
    align = _alignment(k, v)
    dk, dv = (x.new_empty(batch, tokens, heads, dim) for x in (k, v))
    _run(
        "state_backward", _in_steps(tokens, batch * heads),
        (k, v, *_table(dstate, k.dtype), dtotal.contiguous(), dk, dv, *_strides(align, k, v), heads, tokens),
        _linear(dim, align, feature_map),
    )  # fmt: skip
    return dk.transpose(1, 2), dv.transpose(1, 2)


def apply(
    q: torch.Tensor,
    exact: torch.Tensor,
    table: torch.Tensor,
    total: torch.Tensor,
    bias: torch.Tensor | None,
    feature_map: str,
) -> torch.Tensor:
    """See `ops.apply`."""
    q, exact, total = _rows(q), _rows(exact), total.contiguous()
    batch, heads, tokens, dim = q.shape
    align = _alignment(q)
    out = q.new_empty(batch, tokens, heads, dim)
    _run(
        "apply", _in_steps(tokens, batch * heads),
        (
            q, exact, *_table(table, q.dtype), total, total if bias is None else bias.contiguous(), out,
            *_strides(align, q), *exact.stride()[:3], heads, tokens,
        ),
        {**_linear(dim, align, feature_map), "HAS_BIAS": bias is not None},
    )  # fmt: skip
    return out.transpose(1, 2)


def apply_backward(
    gradient: torch.Tensor, q: torch.Tensor, table: torch.Tensor, total: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.apply_backward`."""
    q, gradient, total = _rows(q), _rows(gradient), total.contiguous()
    batch, heads, tokens, dim = q.shape
    align = _alignment(q)
    dq = q.new_empty(batch, tokens, heads, dim)
    factors = _room_for_factors(q)
    _run(
        "apply_backward", _in_steps(tokens, batch * heads),
        (
            q, gradient, *_table(table, q.dtype), total, dq, *factors,
            *_strides(align, q), *gradient.stride()[:3], heads, tokens,
        ),
        _linear(dim, align, feature_map),
    )  # fmt: skip
    return dq.transpose(1, 2), *_sums(q, gradient, factors, feature_map)


def _sums(
    q: torch.Tensor, gradient: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d(state) [B, H, D, D], d(total) [B, H, D] and d(bias) [D] in fp32, from 1 / d and r; see `sums_kernel`."""
    batch, heads, tokens, dim = q.shape
    splits, align = triton.cdiv(tokens, configs.SPLIT), _alignment(q)
    dstates = q.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    dtotals, dbiases = (q.new_empty(batch, heads, splits, dim, dtype=torch.float32) for _ in range(2))
    _run(
        "sums", (splits, batch * heads),
        (
            q, gradient, *factors, dstates, dtotals, dbiases,
            *_strides(align, q), *gradient.stride()[:3], heads, tokens,
        ),
        {**_linear(dim, align, feature_map), "SPLIT": configs.SPLIT},
    )  # fmt: skip
    return dstates.sum(2), dtotals.sum(2), dbiases.sum((0, 1, 2))


def marginal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, torch.Tensor],
    lists: Lists,
    cut: Cut,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.marginal`; `whole`: state and total over all keys."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, tokens, dim = q.shape
    align, (table, total) = _alignment(q, k, v), whole
    out = q.new_empty(batch, tokens, heads, dim)
    denominators = q.new_empty(batch, heads, tokens, 1, dtype=torch.float32)
    modes = lists.kept.new_empty(lists.kept.shape[:-1])
    _run(
        "marginal", (cut.blocks, batch * heads),
        (
            q, k, v, *_table(table, q.dtype), total.contiguous(), *lists, out, denominators, modes,
            *_strides(align, q, k, v), *cut.grid, heads, tokens, *lists.counts,
        ),
        {**_linear(dim, align, feature_map), **_cut(cut)},
    )  # fmt: skip
    return out.transpose(1, 2), denominators, modes


def marginal_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, torch.Tensor],
    lists: Lists,
    denominators: torch.Tensor,
    modes: torch.Tensor,
    cut: Cut,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.marginal_backward`."""
    gradient, q, k, v = (_rows(x) for x in (gradient, q, k, v))
    batch, heads, tokens, dim = q.shape
    align, (table, total) = _alignment(q, k, v), whole
    dq, dk, dv = (q.new_empty(batch, tokens, heads, dim) for _ in range(3))
    factors = inverses, ratios = _room_for_factors(q)
    sizes = *_strides(align, q, k, v), *gradient.stride()[:3], *cut.grid, heads, tokens, *lists.counts
    constants = {**_linear(dim, align, feature_map), **_cut(cut)}
    _run(
        "marginal_dq", (cut.blocks, batch * heads),
        (
            q, k, v, gradient, *_table(table, q.dtype), total.contiguous(), *lists, modes, denominators,
            dq, inverses, ratios, *sizes,
        ),
        constants,
    )  # fmt: skip
    of_state, of_total, _ = _sums(q, gradient, factors, feature_map)
    singles = modes.argsort(dim=-1, descending=True, stable=True).int()
    rows = configs.key_rows(cut.block, constants["BLOCK_D"], _capability(q.device))
    _run(
        "marginal_dkdv", (cut.blocks * cut.block // rows, batch * heads),
        (
            q, k, v, gradient, *_table(of_state, q.dtype), of_total, *lists, modes, *_selecting(lists, cut),
            singles, modes.sum(-1, dtype=torch.int32), denominators, ratios, dk, dv, *sizes,
        ),
        {**constants, "ROWS": rows},
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _selecting(lists: Lists, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """The query blocks that keep or drop each key block, one behind the other, and where a key block's begin."""
    both = torch.cat(lists, dim=-1)
    geometry = Geometry(
        cut.grid, cut.grid, cut.block, cut.block, cut.tile, cut.tile, reference=0, text=0, own_queries=False
    )  # fmt: skip
    counts = both.new_full(both.shape[:-1], both.shape[-1])
    found = transpose_lists(both, counts, geometry)
    return found.entries, found.firsts[:, ::2].contiguous()


def _run(kernel: str, programs: tuning.Programs, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    first = arguments[0]
    if INTERPRETED and first.dtype == torch.bfloat16:
        raise DitAccelError(
            "impl='triton' cannot compute this: Triton's interpreter has no bfloat16 arithmetic. "
            "Use impl='portable' or 'auto'."
        )
    if not INTERPRETED and not first.is_cuda:
        raise DitAccelError(
            f"impl='triton' cannot compute this: the tensors are on {first.device}; Triton needs a CUDA device or "
            "TRITON_INTERPRET=1. Use impl='portable' or 'auto'."
        )
    capability = _capability(first.device)
    candidates = configs.fitting(kernel, constants, first.element_size(), capability)
    if not candidates:
        raise DitAccelError(
            f"The {kernel} kernel for head dimension {constants['D']} needs more shared memory than compute capability "
            f"{capability // 10}.{capability % 10} has; use smaller blocks, or impl='portable'."
        )
    tuning.launch(JIT[kernel], programs, arguments, constants, candidates, configs.TUNED_BY)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # interpreted: any launch will do
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _in_steps(rows: int, heads: int) -> tuning.Programs:
    """Programs that take STEP rows each."""
    return lambda meta: (triton.cdiv(rows, meta["STEP"]), heads)


def _room_for_means(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], x.shape[-1], cut.blocks, dtype=torch.float32)


def _room_for_factors(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / d and r of every row, fp32 [B, H, N]."""
    inverses, ratios = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return inverses, ratios


def _linear(dim: int, align: int, feature_map: str) -> dict[str, Any]:
    return {**_head_dim(dim), "ALIGN": align, "MAP": feature_map, "PRECISION": "ieee"}


def _head_dim(dim: int) -> dict[str, int]:
    return {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}


def _cut(cut: Cut) -> dict[str, int]:
    return dict(zip(("BLOCK", "TILE_T", "TILE_H", "TILE_W"), cut.pack()[3:], strict=True))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with rows of contiguous elements, which is what a model hands over."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _alignment(*tensors: torch.Tensor) -> int:
    """Elements that all strides are multiples of: 16 bytes' worth, or 1."""
    unit = 16 // tensors[0].element_size()
    aligned = all(s % unit == 0 for x in tensors for s in x.stride()[:3]) and all(
        x.data_ptr() % 16 == 0 for x in tensors
    )
    return unit if aligned else 1


def _strides(align: int, *tensors: torch.Tensor) -> list[int]:
    return [stride // align for x in tensors for stride in x.stride()[:3]]


def _table(state: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A state [B, H, D, D] as factors in `dtype` and fp32 [B, H]: half precision has no room for its range."""
    peaks = state.new_ones(state.shape[:2])
    if dtype == torch.float16:
        _, exponents = torch.frexp(state.abs().amax((-2, -1)))
        peaks = torch.ldexp(peaks, exponents)
        state = state / peaks[..., None, None]
    return state.to(dtype).contiguous(), peaks
