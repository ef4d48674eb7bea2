"""The Triton kernels of the router, on a GPU or under Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this file runs in a process of its own.
"""

import importlib.util
import os

import pytest
import torch
from router_calls import GRIDS, RULES, check_deviations, dense, inputs

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.impls import Facts
from dit_accel.kernels.router.api import route, route_pooled
from dit_accel.kernels.router.rule import Rule
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if NATIVE else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if NATIVE else [])]
SIZES = [(16, 16, None, None), (64, 16, None, None), (16, 32, (1, 4, 4), (2, 2, 8))]
# Pairwise: every rule with every grid, cuts and dtypes in turn
CASES = [
    pytest.param(grid, SIZES[(i + j) % len(SIZES)], rule, DTYPES[(i + j) % len(DTYPES)], id=f"{rule}-{grid}")
    for i, rule in enumerate(RULES)
    for j, grid in enumerate(GRIDS)
]


def lists(q, k, orders, rule, impl):
    """On the CPU."""
    device = DEVICE if impl == "triton" else "cpu"
    moved = {name: x.to(device) for name, x in vars(rule).items() if isinstance(x, torch.Tensor)}
    listed = route(q.to(device), k.to(device), *orders, Rule(**{**vars(rule), **moved}), impl=impl)
    return BlockLists(listed.indices.cpu(), listed.counts.cpu())


@pytest.mark.parametrize(("grid", "sizes", "rule", "dtype"), CASES)
def test_lists_what_the_definition_lists(grid, sizes, rule, dtype):
    """The scores of these rows differ by more than their rounding."""
    q, k = inputs(grid, dtype)
    orders = TokenOrder(grid, sizes[0], sizes[2]), TokenOrder(grid, sizes[1], sizes[3])
    rule = RULES[rule](*(order.visual_blocks for order in orders))
    wanted, actual = (lists(q, k, orders, rule, impl) for impl in ("reference", "triton"))
    dense(actual, orders[1].visual_blocks)  # ascending, 0 behind
    assert torch.equal(actual.counts, wanted.counts) and torch.equal(actual.indices, wanted.indices)


@pytest.mark.parametrize(("grid", "dtype"), [(grid, DTYPES[i % len(DTYPES)]) for i, grid in enumerate(GRIDS)], ids=str)
def test_deviations_of_tokens_that_exist(grid, dtype):
    """Also of blocks that are read in parts."""
    for block, tile in ((16, None), (16, (2, 2, 4)), (64, (1, 8, 8)), (256, None)):
        check_deviations(grid, block, tile, dtype, "triton", DEVICE)


@pytest.mark.parametrize("rule", ["union", "tau", "heads"])
def test_vectors_of_whole_blocks(rule):
    queries, keys = torch.randn(2, 3, 9, 24, device=DEVICE), torch.randn(2, 3, 70, 24, device=DEVICE)
    rule = RULES[rule](9, 70)
    listed = [route_pooled(queries, keys, rule, scale=0.3, impl=impl) for impl in ("reference", "triton")]
    dense(listed[1], 70)
    assert all(torch.equal(*pair) for pair in zip(listed[0][:2], listed[1][:2], strict=True))
    single = TokenOrder(TokenGrid(1, 1, 70), 1)
    facts = Facts.of(torch.device(DEVICE), torch.float32, 24, single, single)
    assert impls.beside("triton", facts, impls.ROUTER) == "triton"


def one_row(scores, rule):
    """What a rule lists in a row of blocks with these logits; a block is 16 equal tokens."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    q = torch.zeros(1, 1, 16 * len(scores), 1, device=DEVICE)
    q[..., 0] = 1
    k = scores.repeat_interleave(16).view(1, 1, -1, 1).to(DEVICE)
    order = TokenOrder(TokenGrid(1, 1, q.shape[2]), 16)
    listed = route(q, k, order, order, rule, scale=1.0, impl="triton")
    return listed.indices[0, 0, 0, : listed.counts[0, 0, 0]].tolist()


def test_equal_scores_and_what_is_no_number():
    nan = float("nan")
    assert one_row([0.0] * 20, Rule(topk=3)) == [0, 1, 2]
    assert one_row([0.0] * 20, Rule(topp=0.24)) == [0, 1, 2, 3, 4]
    assert one_row([-0.0, 0.0, nan], Rule(topk=1)) == [2]  # NaN reaches the output
    assert one_row([nan, -float("inf"), -3.0], Rule(topk=1)) == [0]
    assert one_row([1.0, 5.0, 2.0, 5.0], Rule(tau=50.0)) == [1]
    assert one_row([nan] * 3, Rule(tau=1.0)) == [0]
    for rule in (Rule(topk=9), Rule(topp=1.0), Rule(tau=-float("inf")), Rule(similarity=2.0)):
        assert one_row([0.0, -500.0, 80.0, 3.0], rule) == [0, 1, 2, 3]


def test_rows_of_more_than_a_warp_holds():
    """1,100 blocks: two warps on a GPU."""
    grid = TokenGrid(1, 1, 1100 * 16)
    q, k = torch.zeros(2, 1, 1, grid.tokens, 4)
    q[..., :128, :], k[:] = torch.randn(4), torch.randn(1100, 4).repeat_interleave(16, 0)
    orders = TokenOrder(grid, 128), TokenOrder(grid, 16)
    for rule in (Rule(topk=20, topp=0.1), Rule(tau=1.0)):
        wanted, actual = (lists(q, k, orders, rule, impl) for impl in ("portable", "triton"))
        assert torch.equal(actual.counts, wanted.counts) and torch.equal(actual.indices, wanted.indices)


def test_runs_are_equal():
    q, k = inputs(GRIDS[0], torch.float32)
    orders = (TokenOrder(GRIDS[0], 16),) * 2
    runs = [lists(q, k, orders, Rule(topk=2, topp=0.4, cells=2), "triton") for _ in range(2 if INTERPRETED else 10)]
    assert all(torch.equal(run.indices, runs[0].indices) for run in runs)


def test_what_it_cannot_route_is_routed_by_another():
    orders = (TokenOrder(TokenGrid(1, 1, 90), 24),) * 2
    long = TokenOrder(TokenGrid(1, 512, 512), 16)
    fits = TokenOrder(TokenGrid(1, 1, 90), 16)
    for order, name in ((orders[0], "auto"), (fits, "triton"), (long, "auto")):
        facts = Facts.of(torch.device(DEVICE), torch.float32, 8, order, order)
        assert impls.beside("triton", facts, impls.ROUTER) == name


@pytest.mark.parametrize("rule", ["topk", "topp", "union", "cells", "guard"])
def test_a_block_with_nan_is_listed_in_every_row(rule):
    grid = TokenGrid(3, 5, 7)
    q, k = inputs(grid, torch.float32)
    q[0, 1, 50] = k[0, 1, 50] = torch.nan
    orders = TokenOrder(grid, 16), TokenOrder(grid, 16)
    listed = lists(q, k, orders, RULES[rule](7, 7), "triton")
    assert dense(listed, 7)[0, 1, :, 50 // 16].all()
