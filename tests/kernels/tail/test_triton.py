"""The Triton kernels of the tail, on a GPU or under Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this file runs in a process of its own.
"""

import dataclasses
import functools
import importlib.util

import pytest
import torch
from accuracy import assert_accurate
from layouts import check_layouts
from messages import names
from roundings import gradient_sizes
from tail_calls import (
    INTERPRETED,
    PARTS,
    TEXT,
    Case,
    beside,
    check,
    check_error_calls,
    check_rows_without_keys,
    lists_of,
    setup,
)

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import visual_call
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.tail.api import attend_with_tail, with_first_order
from dit_accel.kernels.tail.ops import attention_with_tail, attention_with_tail_backward
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
    "two groups": Case(TokenGrid(1, 131, 1), 128, 16, tile_k=(1, 2, 8), dim=16, **ONE),  # two tokens a block
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
    case = Case(SMALL, dim=16, impl="triton", **(ONE if INTERPRETED else {}))
    tensors, (upstream, grad_lse), listed, _ = setup(case)
    lists, first = lists_of(listed.to(case.device)), None
    for _ in range(2 if INTERPRETED else 10):
        leaves = [x.to(case.device).requires_grad_() for x in tensors]
        results = attend_with_tail(*leaves, lists, *case.orders, impl="triton")[:2]
        grads = torch.autograd.grad(results, leaves, [upstream.to(case.device), grad_lse.to(case.device)])
        run = [*results, *grads]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


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
    grid = TokenGrid(2, 5, 13, text=9)
    settings = {"block_q": 64, "block": 32, "order": order, "tail": "hybrid", "variance": "exact"}
    plan = dit_accel.plan("sol", grid, **settings)
    tensors = torch.randn(3, 1, 1, grid.tokens, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = tensors.to("cuda" if NATIVE else "cpu").unbind(0)
    routed, wanted = (plan.route(q, k, impl=impl) for impl in ("triton", "portable"))
    assert all(torch.equal(a, b) for a, b in zip(routed[:2], wanted[:2], strict=True))
    got = dit_accel.attention(q, k, v, plan, impl="triton")
    exact = dit_accel.attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), plan, impl="portable")
    plain = dit_accel.attention(q.cpu(), k.cpu(), v.cpu(), plan, impl="portable")
    assert_accurate("out", got.cpu(), plain, exact)
    assert shapes == [(16, 32), (16, 16), (16, 16)]  # the tail over whole blocks, visual queries, text


def leaves_of(case):
    """q, k and v on the case's device with gradients, lists, dropped blocks, and the upstream gradient."""
    tensors, (upstream, _), listed, dropped = setup(case)
    leaves = [x.to(case.device).requires_grad_() for x in tensors]
    lists = lists_of(listed).to(torch.device(case.device))
    return leaves, lists, None if dropped is None else dropped.to(case.device), upstream.to(case.device)


def test_rows_without_keys_are_zero_and_without_listed_keys_all_tail():
    check_rows_without_keys("triton", dim=16)


def test_the_callers_defaults_do_not_matter(request):
    case = Case(SMALL, dim=16, dropped=0.3, impl="triton", **ONE)
    leaves, lists, dropped, upstream = leaves_of(case)

    def results():
        out, lse, share = attend_with_tail(*leaves, lists, *case.orders, dropped=dropped, share=True, impl="triton")
        return out, lse, share, *torch.autograd.grad((out * upstream).sum() + share.sum(), leaves)

    wanted = results()
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))


def test_a_map_of_dropped_blocks_has_any_strides():
    case = Case(SMALL, dim=16, dropped=0.5, impl="triton", batch=1)
    leaves, lists, dropped, _ = leaves_of(case)
    permuted = dropped.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert not permuted.is_contiguous()
    call = functools.partial(attend_with_tail, *leaves, lists, *case.orders, share=True, impl="triton")
    results = [call(dropped=x) for x in (permuted, dropped)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_casts_as_attention_does():
    """By one kernel; tests/kernels/tail/test_tail.py has the other way."""
    case = Case(SMALL, dim=16, impl="triton", **ONE)
    leaves, lists, _, _ = leaves_of(case)
    attend = functools.partial(attend_with_tail, lists=lists, share=True, impl="triton")
    orders = dict(zip(("query_order", "key_order"), case.orders, strict=True))
    with torch.autocast(case.device, torch.float16):
        got = attend(*leaves, **orders)
    want = attend(*(x.half() for x in leaves), **orders)
    assert got[0].dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_lists_with_tables_are_refused():
    case = Case(SMALL, dim=16, impl="triton")
    leaves, lists, _, _ = leaves_of(case)
    tabled = lists._replace(tables=torch.zeros(1, dtype=torch.int32, device=case.device))
    with pytest.raises(DitAccelError, match=names("tables")):
        attend_with_tail(*leaves, tabled, *case.orders, impl="triton")


@pytest.mark.parametrize("name", ["dropped", "tiles", "fp16", "everything listed", "text"])
def test_beside_attention_that_does_not_take_it(name):
    check(dataclasses.replace(CASES[name], impl="triton"), attend=beside)


def test_text_that_is_weighed_is_merged_behind_the_tail():
    """Output, LSE, share and gradients within the budget; in fp64 `portable` has no rounding that counts."""
    case = Case(TokenGrid(2, 3, 7, **TEXT), dim=16, impl="triton", heads=1)
    tensors, (upstream, grad_lse), listed, _ = setup(case)
    lists = lists_of(listed)
    bias, lens = torch.randn(2, case.grid.tokens), torch.tensor([11, 3])

    def results(impl, dtype, device="cpu"):
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
        text = {"text_lens": lens.to(device), "text_bias": bias.to(device, dtype)}
        out, lse, share = attend_with_tail(
            *leaves, lists.to(torch.device(device)), *case.orders, share=True, impl=impl, **text
        )
        whole = with_first_order(out, share, *leaves, case.orders[1], None)
        total = (whole * upstream.to(out)).sum() + (lse * grad_lse.to(lse)).sum()
        return [x.detach().cpu() for x in (whole, lse, share, *torch.autograd.grad(total, leaves))]

    got, plain = results("triton", torch.float32, case.device), results("portable", torch.float32)
    exact = results("portable", torch.float64)
    q, k, v = (x.double() for x in tensors)
    queries, scale, (out, lse) = q[:, :, case.grid.visual_rows], case.dim**-0.5, exact[:2]
    place = torch.arange(case.grid.tokens) - case.grid.text_start
    hidden = (place >= lens[:, None]) & (place < case.grid.text)
    weighed = bias.double()[:, case.grid.visual_rows]
    logits = queries @ k.mT * scale + weighed[:, None, :, None] * hidden[:, None, None, :]
    logits = torch.minimum(logits, lse[..., None])
    sizes = gradient_sizes(
        queries, k, v, upstream.double(), out, logits, lse, scale, torch.float32, grad_lse=grad_lse.double()
    )
    average = torch.exp(logits - lse[..., None]) @ v.abs()
    sizes |= {"out": torch.maximum(average, out.abs()), "lse": lse.abs().clamp(min=1)}
    for name, *values in zip(("out", "lse", "share", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_accurate(name, *values, magnitude=PARTS[name] * sizes[name] if name in PARTS else sizes.get(name))


@pytest.mark.parametrize("share", [False, True])
def test_opcheck(share):
    case = Case(TokenGrid(1, 3, 7, text=5), dim=16, dropped=0.3, impl="triton", **ONE)
    (q, k, v), lists, dropped, upstream = leaves_of(case)
    queries, lists, geometry, segments = visual_call(q, lists, *case.orders, torch.tensor([3], device=case.device))
    tensors = [queries.detach().requires_grad_(), k, v, lists.indices, lists.counts, dropped, segments.text_len]
    torch.library.opcheck(attention_with_tail, (*tensors, geometry.pack(), 0.3, share, "triton"))
    results = [x.detach() for x in attention_with_tail(*tensors, geometry.pack(), 0.3, share, "triton")]
    saved = [None if x is None else x.detach() for x in tensors]
    gradients = torch.randn_like(results[1]), torch.randn_like(results[2]) if share else None
    torch.library.opcheck(
        attention_with_tail_backward, (upstream, *gradients, *results, saved, geometry.pack(), 0.3, share, "triton")
    )


def test_compiles_in_one_graph():
    case = Case(TokenGrid(1, 3, 7, text=5), dim=16, impl="triton", **ONE)
    leaves, lists, _, _ = leaves_of(case)

    def attend(q, k, v, indices, counts):
        lists = BlockLists(indices, counts)
        out, _, share = attend_with_tail(q, k, v, lists, *case.orders, share=True, impl="triton")
        return with_first_order(out, share, q, k, v, case.orders[1], None)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want, got = (function(*leaves, lists.indices, lists.counts) for function in (attend, compiled))
    assert torch.equal(got, want)
    grads = (torch.autograd.grad(out.sin().sum(), leaves) for out in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_strides_do_not_matter():
    check_layouts(dit_accel.plan("sol", TokenGrid(2, 4, 4), block=16, block_q=16, tail="hybrid"), "triton")
