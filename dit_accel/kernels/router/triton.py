"""Launches of the router's Triton kernels. Memory: block means, and the scores of all pairs of blocks in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.triton_configs import LARGEST_BLOCK, Launch
from dit_accel.kernels.cuts import contiguous_rows
from dit_accel.kernels.records import Heads, Side
from dit_accel.kernels.router import triton_configs as configs
from dit_accel.kernels.router.portable import cell_sizes
from dit_accel.kernels.router.rule import RouterArguments, thresholds
from dit_accel.kernels.router.triton_kernels import (
    cell_means_kernel,
    deviations_kernel,
    lists_kernel,
    scores_kernel,
)
from dit_accel.order import TokenOrder

JIT = {
    "cell_means": cell_means_kernel,
    "deviations": deviations_kernel,
    "scores": scores_kernel,
    "lists": lists_kernel,
}


def route(q: torch.Tensor, k: torch.Tensor, call: RouterArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.route`."""
    orders = call.query_order, call.key_order
    queries, keys = (cell_means(x, order, call.cells) for x, order in zip((q, k), orders, strict=True))
    batch, heads, rows, _, dim = queries.shape
    blocks = keys.shape[2]
    scores = queries.new_empty(batch, heads, rows, blocks)
    counts = scores.new_empty(batch, heads, rows, dtype=torch.int32)
    # sizes of whole blocks are not read
    sizes = (counts if call.cells == 1 else cell_sizes(order, call.cells, q.device).int() for order in orders)
    tiles = triton.cdiv(rows, configs.SCORES["ROWS"]) * triton.cdiv(blocks, configs.SCORES["COLUMNS"])
    finite = queries.nan_to_num(0.0, 0.0, 0.0)  # else all scores of a row are NaN, and none stands out
    _run(
        "scores", (tiles, batch * heads), 4,
        (finite, keys, *sizes, scores, call.scale, rows, blocks),
        {"D": dim, "CELLS": call.cells, **configs.SCORES},
    )  # fmt: skip
    level = pooled = ranked = None
    if call.tau is not None:
        level = thresholds(queries[..., 0, :], keys[..., 0, :], call.tau, call.exact, call.scale)
    if call.similarity is not None:
        pooled, ranked = (
            (cell_means(x, order, 1, unit=True).square().sum((-1, -2)) > call.similarity).view(torch.uint8)
            for x, order in zip((q, k), orders, strict=True)
        )
    forced = None if call.forced is None else call.forced.contiguous().view(torch.uint8)
    of_rows = (
        None if x is None else x.expand(batch, heads, rows).contiguous() for x in (level, call.counts, call.shares)
    )
    optional = (*of_rows, pooled, ranked, forced)
    parts = (*(x is not None for x in optional[:4]), forced is not None)  # the guard has two tensors
    indices = scores.new_zeros(batch, heads, rows, call.width, dtype=torch.int32)
    worst = scores.new_empty(batch, heads, rows, call.skip, dtype=torch.int32)
    width = configs.width_of(blocks)
    _run(
        "lists", (rows, batch * heads), configs.warps_of(width),
        (
            scores, *(scores if x is None else x for x in optional), indices, counts, worst,
            call.factor, blocks, rows, call.width, call.skip,
        ),
        {"WIDTH": width, **dict(zip(configs.PARTS, parts, strict=True)), "HAS_SKIP": call.skip > 0},
    )  # fmt: skip
    return indices, counts, worst


def cell_means(x: torch.Tensor, order: TokenOrder, cells: int, *, unit: bool = False) -> torch.Tensor:
    """Means of cells as `portable.cell_means`, fp32; of unit vectors if `unit`."""
    if order.block == 1:
        single = torch.nn.functional.normalize(x.float(), dim=-1) if unit else x.float()
        return single[..., None, :].contiguous()
    parts = order.block // cells // LARGEST_BLOCK
    if parts > 1:
        means = cell_means(x, order, parts * cells, unit=unit).unflatten(-2, (cells, parts))
        held = cell_sizes(order, parts * cells, x.device).to(means).unflatten(-1, (cells, parts))
        return (held[..., None, :] @ means).squeeze(-2) / held.sum(-1, keepdim=True).clamp(min=1)
    x = contiguous_rows(x)
    batch, heads, _, dim = x.shape
    means = x.new_empty(batch, heads, order.visual_blocks, cells, dim, dtype=torch.float32)
    align = tuning.alignment(x)
    _run(
        "cell_means", (order.visual_blocks * cells, batch * heads), 4,
        (means, Heads.of(x, align), Side.of(order, x.shape[2]), heads),
        {
            **tuning.head_dims(dim), "ALIGN": align, **tuning.block_sizes(order),
            "CELL": order.block // cells, "UNIT": unit,
        },
    )  # fmt: skip
    return means


def deviations(x: torch.Tensor, order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.deviations`."""
    x = contiguous_rows(x)
    batch, heads, _, dim = x.shape
    means, gaps = (x.new_empty(batch, heads, order.visual_blocks, dim, dtype=torch.float32) for _ in range(2))
    align = tuning.alignment(x)
    _run(
        "deviations", (order.visual_blocks, batch * heads), 4,
        (means, gaps, Heads.of(x, align), Side.of(order, x.shape[2]), heads),
        {
            **tuning.head_dims(dim), "ALIGN": align, **tuning.block_sizes(order),
            "PART": min(order.block, LARGEST_BLOCK),
        },
    )  # fmt: skip
    return means, gaps


def _run(kernel: str, programs: tuple[int, int], warps: int, arguments: Any, constants: dict[str, Any]) -> None:
    tuning.launch(JIT[kernel], programs, arguments, constants, (Launch(warps=warps, stages=1, step=0),), ())
