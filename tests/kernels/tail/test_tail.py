"""The tail: output, LSE and gradients against fp64, the mass, and the refusals."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from messages import names
from roundings import assert_dense
from tail_calls import PARTS, TEXT, Case, check, check_rows_without_keys, lists_of, setup

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.tail import api
from dit_accel.kernels.tail.api import attend_with_tail, with_first_order, with_tail
from dit_accel.tokens import TokenGrid

TILES = {"tile_q": (1, 4, 4), "tile_k": (2, 2, 4)}
CASES = {
    "one token": Case(TokenGrid(1, 1, 1), listed=1.0),
    "63": Case(TokenGrid(1, 7, 9), 64, 64, listed=1.0, dim=40),
    "64": Case(TokenGrid(1, 8, 8), 64, 16, dim=128),
    "65": Case(TokenGrid(1, 5, 13), 16, 64, dim=40),
    "1000": Case(TokenGrid(10, 10, 10), 128, 64, batch=1, dim=72),
    "ragged": Case(),
    "x4": Case(size=4.0),
    "x16": Case(size=16.0, dim=96),
    "everything listed": Case(listed=1.0),
    "scale": Case(scale=0.3),
    "negative scale": Case(scale=-0.3),
    "tiles": Case(**TILES),
    "dropped": Case(dropped=0.5),
    "all dropped": Case(dropped=1.0),
    "text": Case(TokenGrid(3, 5, 9, **TEXT), text_lens=(11, 3)),
    "text first": Case(TokenGrid(3, 5, 9, text=11, text_first=True), text_lens=(0, 5), **TILES),
    "first order": Case(first_order=True),
    "first order, text, tiles": Case(TokenGrid(3, 5, 9, **TEXT), first_order=True, dropped=0.3, **TILES),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16 x4": Case(TokenGrid(3, 5, 9, **TEXT), dtype=torch.bfloat16, size=4.0, dropped=0.2),
    "bf16 first order": Case(dtype=torch.bfloat16, first_order=True),
    "fp16": Case(dtype=torch.float16, **TILES),
}


@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case, impl):
    check(Case(**{**vars(case), "impl": impl}))


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_rows_without_keys_are_zero_and_without_listed_keys_all_tail(impl):
    check_rows_without_keys(impl)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_gradcheck(impl):
    """Gradients of the tail alone, those of the exact part's output and LSE too, against finite differences."""
    case = Case(TokenGrid(1, 3, 5), 4, 4, dim=4, batch=1, heads=1, dtype=torch.float64, dropped=0.2)
    tensors, _, listed, dropped = setup(case)
    lists = lists_of(listed)
    exact, lse = attend_visual(*tensors, lists, *case.orders, lse=True)

    def call(q, k, v, exact, lse):
        settings = {"dropped": dropped, "impl": impl}
        return with_tail(q, k, v, exact, lse, lists, *case.orders, **settings)

    leaves = [x.clone().requires_grad_() for x in (*tensors, exact, lse)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def attended(case, q, k, v, listed, dropped=None):
    lists = lists_of(listed)
    exact, lse = attend_visual(q, k, v, lists, *case.orders, lse=True, impl=case.impl)
    settings = {"dropped": dropped, "impl": case.impl}
    return (exact, lse), with_tail(q, k, v, exact, lse, lists, *case.orders, **settings)


@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 9), TokenGrid(3, 5, 9, **TEXT)], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_equal_values_come_out_unchanged(grid, order):
    case = Case(grid, **(TILES if order == "tile" else {}))
    (q, k, _), _, listed, _ = setup(case)
    value = torch.randn(case.batch, case.heads, 1, case.dim)
    _, (out, _) = attended(case, q, k, value.expand(q.shape), listed)
    visual = slice(grid.visual_start, grid.visual_start + grid.visual)
    assert_dense(out, *(x[:, :, visual] for x in (q, k, value.expand(q.shape))), PARTS["out"])


def test_the_mass_only_grows():
    case = Case()
    (q, k, v), _, listed, dropped = setup(Case(dropped=0.5))
    (_, exact_lse), (_, lse) = attended(case, q, k, v, listed)
    assert bool((lse >= exact_lse).all()) and bool((lse > exact_lse).any())
    _, (_, less) = attended(case, q, k, v, listed, dropped)
    assert bool((less <= lse).all()) and bool((less < lse).any())


def test_a_tail_of_equal_keys_is_exact():
    """Where all keys of a block are equal, its pseudo-key is no approximation."""
    case = Case(TokenGrid(4, 4, 6), block_k=16)
    (q, k, v), _, listed, _ = setup(case)
    k = k.unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3)
    _, (out, lse) = attended(case, q, k, v, listed)
    assert_dense(out, q, k, v, PARTS["out"])
    torch.testing.assert_close(lse, (q @ k.mT * case.dim**-0.5).logsumexp(-1))


def test_runs_are_bit_equal():
    case = Case(TokenGrid(3, 5, 9, **TEXT))
    tensors, (upstream, grad_lse), listed, _ = setup(case)
    lists, first = lists_of(listed), None
    for _ in range(10):
        leaves = [x.clone().requires_grad_() for x in tensors]
        exact, lse = attend_visual(*leaves, lists, *case.orders, lse=True)
        results = with_tail(*leaves, exact, lse, lists, *case.orders)
        run = [*results, *torch.autograd.grad(results, leaves, [upstream, grad_lse])]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def arguments(case):
    tensors, upstream, listed, dropped = setup(case)
    lists = lists_of(listed)
    leaves = [x.requires_grad_() for x in tensors]
    exact, lse = attend_visual(*leaves, lists, *case.orders, lse=True)
    return leaves, exact.detach().requires_grad_(), lse.detach().requires_grad_(), lists, dropped, upstream


@pytest.mark.parametrize("dropped", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, dropped):
    case = Case(TokenGrid(2, 4, 5), dtype=dtype, dropped=dropped)
    leaves, exact, lse, lists, drop, (grad, grad_lse) = arguments(case)
    settings = api.Geometry.of(*case.orders).pack(), 0.3, "portable"
    tensors = *leaves, exact, lse
    torch.library.opcheck(api.tail_forward, (*tensors, lists.indices, lists.counts, drop, *settings))
    out, total = api.tail_forward(*tensors, lists.indices, lists.counts, drop, *settings)
    results = out.detach(), total.detach()
    saved = [*(x.detach() for x in tensors), lists.indices, lists.counts, drop]
    for upstream in (None, grad_lse):
        torch.library.opcheck(api.tail_backward, (grad, upstream, *results, saved, *settings))


def test_compiles_in_one_graph():
    case = Case(TokenGrid(2, 4, 5, **TEXT))
    leaves, _, _, lists, _, _ = arguments(case)

    def attend(q, k, v, indices, counts):
        lists = BlockLists(indices, counts)
        out, _, share = attend_with_tail(q, k, v, lists, *case.orders, share=True)
        return with_first_order(out, share, q, k, v, case.orders[1], None)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want, got = (function(*leaves, lists.indices, lists.counts) for function in (attend, compiled))
    assert torch.equal(got, want)
    grads = (torch.autograd.grad(out.sin().sum(), leaves) for out in (want, got))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_every_implementation_is_loaded_before_a_call_is_traced():
    program = """
from dit_accel.kernels import impls
import dit_accel.kernels.tail.api
import sys
missing = [row.module for row in impls.ROWS if row.kernel == impls.TAIL and row.module not in impls._LOADED]
assert not missing and "triton" not in sys.modules, missing
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("number", range(5))
def test_gradients_of_the_exact_part_are_known_to_follow(monkeypatch, number):
    row = impls.named("portable", impls.TAIL)
    only_forward = dataclasses.replace(row, cannot=lambda facts: "no gradients" if facts.gradients else None)
    monkeypatch.setitem(impls._TABLE, (row.kernel, row.name), only_forward)
    case = Case()
    leaves, exact, lse, lists, _, _ = arguments(case)
    tensors = [x.detach() for x in (*leaves, exact, lse)]
    with_tail(*tensors, lists, *case.orders, impl="portable")
    tensors[number].requires_grad_()
    with pytest.raises(DitAccelError, match="no gradients"):
        with_tail(*tensors, lists, *case.orders, impl="portable")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_attention_does(dtype):
    case = Case(impl="reference")
    tensors, _, listed, _ = setup(case)
    lists = lists_of(listed)

    def attend(*tensors):
        return attend_with_tail(*tensors, lists, *case.orders, share=True, impl="portable")

    with torch.autocast("cpu", dtype):
        got = attend(*tensors)
    want = attend(*(x.to(dtype) for x in tensors))
    assert got[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_refusals():
    case = Case()
    leaves, exact, lse, lists, _, _ = arguments(case)
    call = {"lists": lists, "query_order": case.orders[0], "key_order": case.orders[1]}
    with pytest.raises(DitAccelError, match="135 visual tokens"):
        with_tail(*leaves, exact[:, :, :9], lse, **call)
    with pytest.raises(DitAccelError, match="exact_lse must be"):
        with_tail(*leaves, exact, lse[..., :9], **call)
    with pytest.raises(DitAccelError, match="needs lists"):
        with_tail(*leaves, exact, lse, **{**call, "lists": BlockLists(lists.indices[0], lists.counts[0])})
    tabled = BlockLists(lists.indices, lists.counts, tables=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(DitAccelError, match=names("tables")):
        with_tail(*leaves, exact, lse, **{**call, "lists": tabled})
    with pytest.raises(DitAccelError, match=names("dropped", "bool")):
        with_tail(*leaves, exact, lse, dropped=torch.ones(2, 2, 9, 8), **call)
