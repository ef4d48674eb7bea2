"""The Triton kernels of the tail, on a GPU or under Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this file runs in a process of its own.
"""

import dataclasses
import importlib.util

import pytest
import torch
from accuracy import assert_accurate
from tail_calls import INTERPRETED, TEXT, Case, check, check_error_calls, lists_of, setup

import dit_accel
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.tail.api import with_tail
from dit_accel.tokens import TokenGrid

if importlib.util.find_spec("triton") is not None:
    from dit_accel.kernels.block_sparse import triton as block_sparse
    from dit_accel.kernels.router import triton as router
NATIVE = torch.cuda.is_available() and not INTERPRETED
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
SMALL = TokenGrid(2, 3, 7)
ONE = {"batch": 1, "heads": 1}
TILES = {"tile_q": (1, 2, 8), "tile_k": (2, 2, 4)}
CASES = {
    "one token": Case(TokenGrid(1, 1, 1), dim=16, **ONE),
    "65": Case(TokenGrid(1, 5, 13), 64, 16, dim=40, **ONE),
    "two groups": Case(TokenGrid(1, 35, 30), 128, 16, dim=16, **ONE),
    "strided": Case(SMALL, dim=24),
    "x16": Case(SMALL, dim=32, size=16.0, **ONE),
    "everything listed": Case(SMALL, listed=1.0, dim=16, **ONE),
    "nothing dropped, negative scale": Case(SMALL, scale=-0.3, dim=16, **ONE),
    "dropped": Case(SMALL, dropped=0.5, dim=16),
    "tiles": Case(SMALL, dropped=0.2, dim=24, **TILES, **ONE),
    "text": Case(TokenGrid(2, 3, 7, **TEXT), text_lens=(11, 3), dim=16, heads=1),
    "text first, first order": Case(
        TokenGrid(2, 3, 7, text=9, text_first=True), text_lens=(4,), dim=16, first_order=True, **TILES, **ONE
    ),
    "fp16": Case(SMALL, dtype=torch.float16, dim=32, **ONE),
    "fp16 x4": Case(SMALL, dtype=torch.float16, size=4.0, dim=16, dropped=0.3, **ONE),
}
if NATIVE:
    CASES["bf16"] = Case(SMALL, dtype=torch.bfloat16, dim=64)
    CASES["bf16, long"] = Case(TokenGrid(5, 30, 30), 128, 64, dtype=torch.bfloat16, dim=128, dropped=0.2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case):
    check(Case(**{**vars(case), "impl": "triton"}))


@pytest.mark.skipif(NATIVE, reason="the call lies on the CPU")
def test_blocks_chosen_by_their_error():
    check_error_calls("triton", frames=1)


def test_runs_are_bit_equal():
    case = Case(SMALL, dim=16, impl="triton")
    tensors, (upstream, grad_lse), listed, _ = setup(case)
    lists, first = lists_of(listed.to(case.device)), None
    for _ in range(3 if INTERPRETED else 10):
        leaves = [x.to(case.device).requires_grad_() for x in tensors]
        exact, lse = attend_visual(*leaves, lists, *case.orders, lse=True, impl="triton")
        results = with_tail(*leaves, exact, lse, lists, *case.orders, impl="triton")
        grads = torch.autograd.grad(results, leaves, [upstream.to(case.device), grad_lse.to(case.device)])
        found = [*results, *grads]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("order", ["morton", "tile"])
def test_blocks_too_large_for_the_kernels_run_in_parts(order, monkeypatch):
    """As 256 queries do where kernels take 128; here 64 queries and 32 keys in parts of 16."""
    for row in [row for row in impls.rows() if row.name == "triton" and row.kernel != impls.SLA]:
        cut = dataclasses.replace(row, cuts=dict.fromkeys(row.cuts, 16))
        monkeypatch.setitem(impls._TABLE, (row.kernel, row.name), cut)
    monkeypatch.setattr(router, "LARGEST_BLOCK", 16)
    shapes, stock = [], block_sparse.BlockSparseLaunches.__init__
    monkeypatch.setattr(
        block_sparse.BlockSparseLaunches,
        "__init__",
        lambda self, call, *others: (
            shapes.append((call.geometry.block_q, call.geometry.block_k)) or stock(self, call, *others)
        ),
    )
    grid = TokenGrid(3, 6, 13, text=9)
    settings = {"block_q": 64, "block": 32, "order": order, "tail": "hybrid", "variance": "exact"}
    plan = dit_accel.plan("sol", grid, **settings)
    tensors = torch.randn(3, 1, 2, grid.tokens, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = tensors.to("cuda" if NATIVE else "cpu").unbind(0)
    routed, wanted = (plan.route(q, k, impl=impl) for impl in ("triton", "portable"))
    assert all(torch.equal(a, b) for a, b in zip(routed[:2], wanted[:2], strict=True))
    got = dit_accel.attention(q, k, v, plan, impl="triton")
    exact = dit_accel.attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), plan, impl="portable")
    plain = dit_accel.attention(q.cpu(), k.cpu(), v.cpu(), plan, impl="portable")
    assert_accurate("out", got.cpu(), plain, exact)
    assert shapes == [(16, 16), (16, 32), (16, 16)]  # visual queries, the tail over whole blocks, text
