"""Launches of the Triton kernels: the state of the linear branch, both directions of the fused kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from dit_accel.errors import DitAccelError
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import Geometry, empty_rows
from dit_accel.kernels.block_sparse.triton_lists import Transposed, transpose_lists
from dit_accel.kernels.block_sparse.triton_places import place_lists
from dit_accel.kernels.cuts import contiguous_rows
from dit_accel.kernels.records import Heads, Lists, SegmentRows, Side
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.arguments import results
from dit_accel.kernels.sla.triton_backward import (
    Statistics,
    sparse_linear_bwd_kernel_dkdv,
    sparse_linear_bwd_kernel_dq,
    sums_kernel,
)
from dit_accel.kernels.sla.triton_forward import SavedBranches, sparse_linear_fwd_kernel, state_kernel
from dit_accel.kernels.sla.triton_linear import Routes, Selecting, StateTable, TokenLayout
from dit_accel.order import TokenOrder

JIT = {
    "state": state_kernel,
    "forward": sparse_linear_fwd_kernel,
    "dq": sparse_linear_bwd_kernel_dq,
    "sums": sums_kernel,
    "dkdv": sparse_linear_bwd_kernel_dkdv,
}


class FusedArguments(NamedTuple):
    """What both directions of a call read besides q, k and v.

    state, total: of the linear branch over all visual keys, see `ops.state`.
    critical, negligible: the router's lists, int32 [B, H, query blocks, *], ascending.
    weight: of the projection, fp32 [D, D].
    text_len: int32 [B].
    """

    geometry: Geometry
    scale: float
    feature_map: str
    linear_scope: str
    state: torch.Tensor
    total: torch.Tensor
    critical: torch.Tensor
    negligible: torch.Tensor
    weight: torch.Tensor
    text_len: torch.Tensor

    @property
    def marginal(self) -> bool:
        return self.linear_scope == "marginal"

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Numbers of visual query blocks, of visual key blocks, and of the key blocks behind them."""
        keys = self.geometry.key_order
        return self.geometry.query_order.visual_blocks, keys.visual_blocks, keys.dense_blocks

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of critical and negligible key blocks of every query block."""
        return self.critical.shape[-1], self.negligible.shape[-1]

    def layout(self, q: torch.Tensor, k: torch.Tensor) -> TokenLayout:
        """Queries and keys, and where the segments of the keys begin."""
        visual_start, conditioning_start, text_start, _ = self.geometry.usual
        queries = Side.of(self.geometry.query_order, q.shape[2])._replace(blocks=self.blocks[0])
        segments = SegmentRows(visual_start, conditioning_start, text_start, self.text_len)
        return TokenLayout(queries, Side.of(self.geometry.key_order, k.shape[2]), segments)

    def routes(self) -> Routes:
        return Routes(self.critical, self.negligible, *self.counts, self.blocks[1])

    def constants(self, q: torch.Tensor, align: int) -> dict[str, Any]:
        """Compile-time constants of the kernels of both branches."""
        return {
            **_linear(q.shape[-1], align, self.feature_map),
            **tuning.block_sizes(self.geometry.query_order, "_Q"),
            **tuning.block_sizes(self.geometry.key_order, "_K"),
            "SCOPE": self.linear_scope,
        }


def state(
    k: torch.Tensor, v: torch.Tensor, order: TokenOrder, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.state`."""
    k, v = contiguous_rows(k), contiguous_rows(v)
    batch, heads, _, dim = k.shape
    split, blocks = configs.SPLIT // order.block, order.visual_blocks
    splits, align = triton.cdiv(blocks, split), tuning.alignment(k, v)
    means = k.new_empty(batch, heads, blocks, dim, dtype=torch.float32)
    states = k.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    totals = k.new_empty(batch, heads, splits, dim, dtype=torch.float32)
    _run(
        "state", (splits, batch * heads),
        (states, totals, means, Heads.of(k, align), Heads.of(v, align), Side.of(order, k.shape[2]), heads, blocks),
        {**_linear(dim, align, feature_map), **tuning.block_sizes(order), "SPLIT": split},
    )  # fmt: skip
    return states.sum(2), totals.sum(2), means


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, call: FusedArguments, training: bool
) -> tuple[torch.Tensor, ...]:
    """See `ops.attend`."""
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    batch, heads, _, _ = q.shape
    align, returned = tuning.alignment(q, k, v), results(q, call.critical, call.linear_scope, training)
    out, exact, lse, linear, denominators, modes = returned
    saved = SavedBranches(exact, lse, linear, denominators, modes, int(training))
    state = StateTable(*table_of_state(call, q.dtype))
    _run(
        "forward", (call.blocks[0], batch * heads),
        (
            out, *(Heads.of(x, align) for x in (q, k, v)), state, call.weight.to(q.dtype).contiguous(),
            call.weight if bias is None else bias.float().contiguous(), call.routes(), critical_lists(call),
            saved, call.layout(q, k), call.scale, heads,
        ),
        {**call.constants(q, align), "HAS_BIAS": bias is not None},
    )  # fmt: skip
    return returned


def backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: Sequence[torch.Tensor],
    call: FusedArguments,
) -> tuple[torch.Tensor, ...]:
    """See `ops.attend_backward`; `saved`: what `forward` returned for training besides the output."""
    gradient, q, k, v = (contiguous_rows(x) for x in (gradient, q, k, v))
    batch, heads, _, _ = q.shape
    weight, layout = call.weight, call.layout(q, k)
    exact, lse, linear, denominators, modes = saved
    pulled = contiguous_rows(gradient @ weight.to(gradient.dtype)) if call.marginal else gradient
    align = tuning.alignment(q, k, v, gradient, pulled, exact)
    read = [Heads.of(x, align) for x in (q, k, v, gradient, pulled)]
    constants = call.constants(q, align)
    dq, dk, dv = (empty_rows(x) for x in (q, k, v))
    delta, inverses, ratios = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))
    statistics = Statistics(lse, delta, inverses, ratios, denominators, modes)
    _run(
        "dq", (call.blocks[0], batch * heads),
        (
            dq, *read, Heads.of(exact, align), StateTable(*table_of_state(call, q.dtype)), call.routes(),
            critical_lists(call), statistics, layout, call.scale, heads,
        ),
        constants,
    )  # fmt: skip
    dstate, dtotal, dbias = _sums(q, pulled, (inverses, ratios), call.feature_map)
    keeping = dropping = _transpose(call.critical, call.geometry)
    singles = n_singles = modes
    if call.marginal:
        dweight = torch.einsum("bhnd,bhne->bhde", gradient, linear.to(gradient.dtype)).sum((0, 1), dtype=torch.float32)
        dbias = gradient.sum((0, 1, 2), dtype=torch.float32)
        dropping = _transpose(call.negligible, dataclasses.replace(call.geometry, conditioning=0, text=0))
        singles, n_singles = modes.argsort(dim=-1, descending=True, stable=True).int(), modes.sum(-1, dtype=torch.int32)
    else:
        # the table is the state times W^T, so the gradient of the table is turned into those of both factors
        dweight, dstate = (dstate.mT @ call.state).sum((0, 1)), dstate @ weight.float()
    rows = configs.key_rows(constants, _capability(q.device))
    selecting = Selecting(
        keeping.entries, keeping.places, keeping.firsts, dropping.entries, dropping.firsts, modes, singles, n_singles
    )
    _run(
        "dkdv", (call.geometry.key_order.blocks * call.geometry.block_k // rows, batch * heads),
        (
            dk, dv, *read, StateTable(*_table(dstate, q.dtype), dtotal), call.routes(), selecting, statistics, layout,
            call.scale, heads,
        ),
        {**constants, "ROWS": rows},
    )  # fmt: skip
    return dq, dk, dv, dweight, dbias


def critical_lists(call: FusedArguments) -> Lists:
    """The lists of critical blocks and of those behind the visual ones, see `place_lists`; without words."""
    order = call.geometry.key_order
    places, spans = place_lists(call.critical, None, order, order.dense_blocks)
    return Lists(places, spans, spans.new_empty(1, dtype=torch.int64), places.shape[-1], 1)


def _transpose(lists: torch.Tensor, geometry: Geometry) -> Transposed:
    """The query blocks that list each key block; all query blocks list those behind the visual ones."""
    keys = geometry.key_order
    if keys.dense_blocks:
        behind = torch.arange(keys.visual_blocks, keys.blocks, dtype=torch.int32, device=lists.device)
        lists = torch.cat([lists, behind.expand(*lists.shape[:-1], -1)], dim=-1)
    return transpose_lists(lists, lists.new_full(lists.shape[:-1], lists.shape[-1]), geometry)


def table_of_state(call: FusedArguments, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The state as `_table` returns it, with the projection applied in scope "all", and the total."""
    state = call.state if call.marginal else call.state @ call.weight.float().mT
    return *_table(state, dtype), call.total.contiguous()


def _sums(
    q: torch.Tensor, gradient: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d(state) [B, H, D, D], d(total) [B, H, D] and d(bias) [D] in fp32, from 1 / d and r; see `sums_kernel`."""
    batch, heads, tokens, dim = q.shape
    splits, align = triton.cdiv(tokens, configs.SPLIT), tuning.alignment(q, gradient)
    dstates = q.new_empty(batch, heads, splits, dim, dim, dtype=torch.float32)
    dtotals, dbiases = (q.new_empty(batch, heads, splits, dim, dtype=torch.float32) for _ in range(2))
    _run(
        "sums", (splits, batch * heads),
        (
            dstates, dtotals, dbiases, Heads.of(q, align), Heads.of(gradient, align), *factors, heads, tokens,
        ),
        {**_linear(dim, align, feature_map), "SPLIT": configs.SPLIT},
    )  # fmt: skip
    return dstates.sum(2), dtotals.sum(2), dbiases.sum((0, 1, 2))


def _run(kernel: str, programs: tuning.Programs, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    first = next((x.start for x in arguments if isinstance(x, Heads)), arguments[0])
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
        return 90  # interpreted: every launch runs
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _linear(dim: int, align: int, feature_map: str) -> dict[str, Any]:
    return {**tuning.head_dims(dim), "ALIGN": align, "MAP": feature_map}


def _table(state: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A state [B, H, D, D] as a table in `dtype` times a factor fp32 [B, H], because fp16 lacks the range."""
    peaks = state.new_ones(state.shape[:2])
    if dtype == torch.float16:
        _, exponents = torch.frexp(state.abs().amax((-2, -1)))
        peaks = torch.ldexp(peaks, exponents)
        state = state / peaks[..., None, None]
    return state.to(dtype).contiguous(), peaks
