"""Calls of the router that the tests of several implementations share."""

import torch

from dit_accel.kernels.router.api import deviations, route
from dit_accel.kernels.router.rule import Rule
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(1, 1, 1), TokenGrid(2, 6, 10, text=5, text_first=True, conditioning=3)]
RULES = {
    "topk": lambda *_: Rule(topk=3),
    "topp": lambda *_: Rule(topp=0.4),
    "union": lambda *_: Rule(topk=2, topp=0.3),
    "tau": lambda *_: Rule(tau=1.0),
    "exact": lambda *_: Rule(tau=0.5, variance="exact"),
    "cells": lambda *_: Rule(topk=2, topp=0.5, cells=2),
    "guard": lambda *_: Rule(topk=2, similarity=0.3),
    "forced": lambda rows, columns: Rule(tau=1.5, forced=torch.rand(rows, columns) < 0.2),
    "heads": lambda rows, columns: Rule(
        topk=torch.tensor([[1], [2], [4]], dtype=torch.int32), topp=torch.rand(2, 3, rows), tau=1.2
    ),
}
# block_q, block_k and their tiles
SIZES = [(4, 4, None, None), (8, 4, None, None), (8, 2, (2, 2, 2), (1, 2, 1)), (64, 16, None, None)]


def dense(lists, columns):
    """Lists as a map: bool [B, H, rows, columns]; each list ascends."""
    indices, counts = lists.indices.long(), lists.counts
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    assert ((indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]).all()
    assert (indices[~listed] == 0).all() and (counts >= 1).all()
    times_listed = torch.zeros(*counts.shape, columns, dtype=torch.int64)
    return times_listed.scatter_add(-1, indices, listed.long()).bool()


def blocks(q, k, rule, grid, block_q=4, block_k=4, tiles=(None, None), **options):
    orders = TokenOrder(grid, block_q, tiles[0]), TokenOrder(grid, block_k, tiles[1])
    return dense(route(q, k, *orders, rule, **options), orders[1].visual_blocks)


def inputs(grid, dtype):
    """q and k whose conditioning and text are NaN, strided as models pass them."""
    q, k = (torch.randn(2, grid.tokens, 3, 6).transpose(1, 2).to(dtype) for _ in range(2))
    around = torch.ones(grid.tokens, dtype=torch.bool)
    around[grid.visual_start : grid.visual_start + grid.visual] = False
    q[..., around, :] = k[..., around, :] = torch.nan
    return q, k


def check_deviations(grid, block, tile, dtype, impl, device="cpu"):
    """Means and mean absolute deviations against loops over the blocks in fp64.

    A sum of n terms and its quotient round n + 1 times, and each gap rounds with the mean before it.
    """
    x, _ = inputs(grid, dtype)
    order = TokenOrder(grid, block, tile)
    means, gaps = (y.cpu() for y in deviations(x.to(device), order, impl=impl))
    assert means.dtype == torch.promote_types(dtype, torch.float32) and means.shape == gaps.shape
    eps = torch.finfo(means.dtype).eps
    visual, of_token = x[:, :, grid.visual_rows].double(), order.block_of_visual()
    for i in range(order.visual_blocks):
        tokens = visual[:, :, of_token == i]
        mean = tokens.mean(2)
        gap = (tokens - mean[:, :, None]).abs().mean(2)
        rounding = (tokens.shape[2] + 1) * eps * tokens.abs().mean(2)
        assert ((means[:, :, i] - mean).abs() <= rounding).all()
        assert ((gaps[:, :, i] - gap).abs() <= 2 * rounding + (tokens.shape[2] + 1) * eps * gap).all()
