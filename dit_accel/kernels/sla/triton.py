"""The Triton implementation: the router and the linear branch; critical blocks go through the block-sparse engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.block_sparse.triton import FUSION, INTERPRETED
from dit_accel.kernels.block_sparse.triton_lists import Transposed, transpose_lists
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.layout import count_blocks
from dit_accel.kernels.sla.triton_linear import apply_kernel, state_kernel
from dit_accel.kernels.sla.triton_linear_backward import apply_backward_kernel, state_backward_kernel, sums_kernel
from dit_accel.kernels.sla.triton_marginal import marginal_kernel
from dit_accel.kernels.sla.triton_marginal_backward import marginal_dkdv_kernel, marginal_dq_kernel
from dit_accel.kernels.sla.triton_router import UNIT, block_means_kernel, select_kernel


def route(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    critical: int,
    skipped: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dit_accel.kernels.sla.router.route_blocks`."""
    batch, heads, _, dim = q.shape
    blocks = count_blocks(grid, block, tile)
    units = triton.cdiv(blocks, UNIT.value)
    means = []
    for x in map(_rows, (q, k)):
        means.append(x.new_zeros(batch, heads, dim, units * UNIT.value, dtype=torch.float32))
        align = _alignment(x)
        _run(
            block_means_kernel, (blocks, batch * heads), configs.MEANS, x, means[-1],
            *_strides(align, x), *grid, heads, units, **_head_dim(dim), ALIGN=align, BLOCK=block, **_tile(tile),
        )  # fmt: skip
    kept, dropped = (q.new_empty(batch, heads, blocks, n, dtype=torch.int32) for n in (critical, skipped))
    width, launch = configs.selection(blocks)
    _run(
        select_kernel, (triton.cdiv(blocks, launch.rows), batch * heads), launch, *means, kept, dropped,
        blocks, units, critical, skipped, D=dim, ROWS=launch.rows, WIDTH=width, HAS_SKIPPED=skipped > 0,
    )  # fmt: skip
    return kept, dropped


def state(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.state`."""
    k, v = _rows(k), _rows(v)
    batch, heads, tokens, dim = k.shape
    splits, align = triton.cdiv(tokens, configs.SPLIT), _alignment(k, v)
    states = k.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    totals = k.new_empty(batch, heads, splits, dim, dtype=torch.float32)
    constants, launch = _linear("state", k, feature_map)
    _run(
        state_kernel, (splits, batch * heads), launch, k, v, states, totals,
        *_strides(align, k, v), heads, tokens, ALIGN=align, SPLIT=configs.SPLIT, **constants,
    )  # fmt: skip
    return states.sum(2), totals.sum(2)


def state_backward(
    k: torch.Tensor, v: torch.Tensor, dstate: torch.Tensor, dtotal: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.state_backward`."""
    k, v = _rows(k), _rows(v)
    batch, heads, tokens, dim = k.shape
    align = _alignment(k, v)
    dk, dv = (x.new_empty(batch, tokens, heads, dim) for x in (k, v))
    constants, launch = _linear("state_backward", k, feature_map)
    _run(
        state_backward_kernel, (triton.cdiv(tokens, launch.rows), batch * heads), launch,
        k, v, *_table(dstate, k.dtype), dtotal.contiguous(), dk, dv,
        *_strides(align, k, v), heads, tokens, ALIGN=align, **constants,
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
    constants, launch = _linear("apply", q, feature_map)
    _run(
        apply_kernel, (triton.cdiv(tokens, launch.rows), batch * heads), launch,
        q, exact, *_table(table, q.dtype), total, total if bias is None else bias.contiguous(), out,
        *_strides(align, q), *exact.stride()[:3], heads, tokens, ALIGN=align, HAS_BIAS=bias is not None, **constants,
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
    inverses, ratios = (q.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
    constants, launch = _linear("apply_backward", q, feature_map)
    _run(
        apply_backward_kernel, (triton.cdiv(tokens, launch.rows), batch * heads), launch,
        q, gradient, *_table(table, q.dtype), total, dq, inverses, ratios,
        *_strides(align, q), *gradient.stride()[:3], heads, tokens, ALIGN=align, **constants,
    )  # fmt: skip
    return dq.transpose(1, 2), *_sums(q, gradient, inverses, ratios, feature_map)


def _sums(
    q: torch.Tensor, gradient: torch.Tensor, inverses: torch.Tensor, ratios: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d(state) [B, H, D, D], d(total) [B, H, D] and d(bias) [D] in fp32; see `sums_kernel`."""
    batch, heads, tokens, dim = q.shape
    splits, align = triton.cdiv(tokens, configs.SPLIT), _alignment(q)
    dstates = q.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    dtotals, dbiases = (q.new_empty(batch, heads, splits, dim, dtype=torch.float32) for _ in range(2))
    constants, launch = _linear("sums", q, feature_map)
    _run(
        sums_kernel, (splits, batch * heads), launch, q, gradient, inverses, ratios, dstates, dtotals, dbiases,
        *_strides(align, q), *gradient.stride()[:3], heads, tokens,
        ALIGN=align, SPLIT=configs.SPLIT, **constants,
    )  # fmt: skip
    return dstates.sum(2), dtotals.sum(2), dbiases.sum((0, 1, 2))


def marginal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.marginal`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, tokens, dim = q.shape
    align, blocks = _alignment(q, k, v), critical.shape[2]
    whole, total = state(k, v, feature_map)
    out = q.new_empty(batch, tokens, heads, dim)
    denominators = q.new_empty(batch, heads, tokens, 1, dtype=torch.float32)
    modes = critical.new_empty(critical.shape[:-1])
    constants, launch = _marginal(q, block, tile, feature_map)
    _run(
        marginal_kernel, (blocks, batch * heads), launch, q, k, v, *_table(whole, q.dtype), total,
        critical.contiguous(), skipped.contiguous(), out, denominators, modes, *_strides(align, q, k, v),
        *grid, heads, tokens, blocks, critical.shape[-1], skipped.shape[-1], ALIGN=align, **constants,
    )  # fmt: skip
    return out.transpose(1, 2), denominators, modes


def marginal_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: torch.Tensor,
    skipped: torch.Tensor,
    denominators: torch.Tensor,
    modes: torch.Tensor,
    grid: Sequence[int],
    block: int,
    tile: Sequence[int] | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.marginal_backward`."""
    gradient, q, k, v = (_rows(x) for x in (gradient, q, k, v))
    critical, skipped = critical.contiguous(), skipped.contiguous()
    batch, heads, tokens, dim = q.shape
    align, blocks = _alignment(q, k, v), critical.shape[2]
    whole, total = state(k, v, feature_map)
    dq, dk, dv = (q.new_empty(batch, tokens, heads, dim) for _ in range(3))
    inverses, ratios = (q.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
    strides = *_strides(align, q, k, v), *gradient.stride()[:3]
    sizes = *grid, heads, tokens, blocks, critical.shape[-1], skipped.shape[-1]
    constants, launch = _marginal(q, block, tile, feature_map)
    _run(
        marginal_dq_kernel, (blocks, batch * heads), launch,
        q, k, v, gradient, *_table(whole, q.dtype), total, critical, skipped, modes, denominators,
        dq, inverses, ratios, *strides, *sizes, ALIGN=align, **constants,
    )  # fmt: skip
    of_state, of_total, _ = _sums(q, gradient, inverses, ratios, feature_map)
    singles = modes.argsort(dim=-1, descending=True, stable=True).int()
    _run(
        marginal_dkdv_kernel, (blocks, batch * heads), launch,
        q, k, v, gradient, *_table(of_state, q.dtype), of_total, critical, skipped, modes,
        *_selecting(critical, skipped, grid, block, tile), singles, modes.sum(-1, dtype=torch.int32),
        denominators, ratios, dk, dv, *strides, *sizes, ALIGN=align, **constants,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _selecting(
    critical: torch.Tensor, skipped: torch.Tensor, grid: Sequence[int], block: int, tile: Sequence[int] | None
) -> Transposed:
    """The query blocks that keep or drop each key block."""
    lists = torch.cat([critical, skipped], dim=-1)
    sizes, tiles = (grid[0], grid[1], grid[2]), None if tile is None else (tile[0], tile[1], tile[2])
    geometry = Geometry(sizes, sizes, block, block, tiles, tiles, reference=0, text=0, own_queries=False)
    counts = lists.new_full(lists.shape[:-1], lists.shape[-1])
    return transpose_lists(lists, counts, None, None, geometry)


def _marginal(
    x: torch.Tensor, block: int, tile: Sequence[int] | None, feature_map: str
) -> tuple[dict[str, Any], configs.Launch]:
    sizes = _head_dim(x.shape[-1])
    launch = configs.marginal(block, sizes["BLOCK_D"], x.element_size(), _capability(x.device))
    return {**sizes, "BLOCK": block, **_tile(tile), "MAP": feature_map, "PRECISION": "ieee"}, launch


def _run(kernel: Any, programs: tuple[int, int], launch: configs.Launch, *arguments: Any, **constants: Any) -> None:
    first = arguments[0]
    if INTERPRETED:
        if first.dtype == torch.bfloat16:
            raise DitAccelError(
                "impl='triton' cannot compute this: Triton's interpreter has no bfloat16 arithmetic. "
                "Use impl='portable' or 'auto'."
            )
        kernel[programs](*arguments, **constants)
        return
    if not first.is_cuda:
        raise DitAccelError(
            f"impl='triton' cannot compute this: the tensors are on {first.device}; Triton needs a CUDA device or "
            "TRITON_INTERPRET=1. Use impl='portable' or 'auto'."
        )
    with torch.cuda.device(first.device):
        kernel[programs](*arguments, **constants, num_warps=launch.warps, num_stages=launch.stages, **FUSION)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # interpreted: any launch will do
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _linear(kernel: str, x: torch.Tensor, feature_map: str) -> tuple[dict[str, Any], configs.Launch]:
    sizes = _head_dim(x.shape[-1])
    launch = configs.linear(kernel, sizes["BLOCK_D"], x.element_size())
    return {**sizes, "ROWS": launch.rows, "MAP": feature_map, "PRECISION": "ieee"}, launch


def _head_dim(dim: int) -> dict[str, int]:
    return {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}


def _tile(tile: Sequence[int] | None) -> dict[str, int]:
    return dict(zip(("TILE_T", "TILE_H", "TILE_W"), tile or (0, 0, 0), strict=True))


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
