"""Launches of the router's Triton kernels. Memory: block means, and the scores of all pairs of blocks in fp32."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.cuts import Cut
from dit_accel.kernels.router import triton_configs as configs
from dit_accel.kernels.router.call import RouterCall, thresholds
from dit_accel.kernels.router.portable import cell_sizes
from dit_accel.kernels.router.triton_kernels import cell_means_kernel, lists_kernel, scores_kernel

JIT = {"cell_means": cell_means_kernel, "scores": scores_kernel, "lists": lists_kernel}


def route(q: torch.Tensor, k: torch.Tensor, call: RouterCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.route`."""
    queries, keys = (
        cell_means(x, cut, call.cells) for x, cut in ((q, call.query_cut), (k, call.key_cut))
    )  # fmt: skip
    batch, heads, rows, _, dim = queries.shape
    blocks = keys.shape[2]
    scores = queries.new_empty(batch, heads, rows, blocks)
    sizes = (_sizes(cut, call.cells, q.device) for cut in (call.query_cut, call.key_cut))
    tiles = triton.cdiv(rows, configs.SCORES["ROWS"]) * triton.cdiv(blocks, configs.SCORES["COLUMNS"])
    _run(
        "scores", (tiles, batch * heads), 4,
        (queries, keys, *sizes, scores, call.scale, rows, blocks),
        {"D": dim, "CELLS": call.cells, **configs.SCORES},
    )  # fmt: skip
    level = pooled = ranked = None
    if call.tau is not None:
        level = thresholds(queries[..., 0, :], keys[..., 0, :], call.tau, call.exact, call.scale)
    if call.similarity is not None:
        pooled, ranked = (
            (cell_means(x, cut, 1, unit=True).square().sum((-1, -2)) > call.similarity).view(torch.uint8)
            for x, cut in ((q, call.query_cut), (k, call.key_cut))
        )
    forced = None if call.forced is None else call.forced.contiguous().view(torch.uint8)
    of_rows = (
        None if x is None else x.expand(batch, heads, rows).contiguous() for x in (level, call.counts, call.shares)
    )
    given = (*of_rows, pooled, ranked, forced)
    parts = (*(x is not None for x in given[:4]), forced is not None)  # the guard has two tensors
    indices = scores.new_zeros(batch, heads, rows, call.width, dtype=torch.int32)
    counts = scores.new_empty(batch, heads, rows, dtype=torch.int32)
    worst = scores.new_empty(batch, heads, rows, call.skip, dtype=torch.int32)
    width = configs.width_of(blocks)
    _run(
        "lists", (rows, batch * heads), configs.warps_of(width),
        (
            scores, *(scores if x is None else x for x in given), indices, counts, worst,
            call.factor, blocks, rows, call.width, call.skip,
        ),
        {"WIDTH": width, **dict(zip(configs.PARTS, parts, strict=True)), "HAS_SKIP": call.skip > 0},
    )  # fmt: skip
    return indices, counts, worst


def cell_means(x: torch.Tensor, cut: Cut, cells: int, *, unit: bool = False) -> torch.Tensor:
    """Means of cells as `portable.cell_means`, fp32; of unit vectors if `unit`."""
    if cut.block == 1:
        single = torch.nn.functional.normalize(x.float(), dim=-1) if unit else x.float()
        return single[..., None, :].contiguous()
    x = tuning.contiguous_rows(x)
    batch, heads, _, dim = x.shape
    means = x.new_empty(batch, heads, cut.blocks, cells, dim, dtype=torch.float32)
    align = tuning.alignment(x)
    names = ("BLOCK", "TILE_T", "TILE_H", "TILE_W")
    _run(
        "cell_means", (cut.blocks * cells, batch * heads), 4,
        (x, means, *(stride // align for stride in x.stride()[:3]), *cut.grid, heads),
        {
            **tuning.head_dims(dim), "ALIGN": align, **dict(zip(names, cut.pack()[3:], strict=True)),
            "CELL": cut.block // cells, "UNIT": unit,
        },
    )  # fmt: skip
    return means


@functools.lru_cache(maxsize=16)
def _sizes(cut: Cut, cells: int, device: torch.device) -> torch.Tensor:
    """Tokens in every cell: int32 [blocks, cells] on a device."""
    with torch.inference_mode(False):
        return cell_sizes(cut.order, cells, torch.device("cpu")).int().to(device)


def _run(kernel: str, programs: tuple[int, int], warps: int, arguments: Any, constants: dict[str, Any]) -> None:
    tuning.launch(JIT[kernel], programs, arguments, constants, (Launch(warps=warps, stages=1, step=0),), ())
