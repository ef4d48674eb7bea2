"""The Triton kernels against the reference in fp64: natively on a GPU, else under Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so `make test` runs this file in a process of its own.
"""

import dataclasses
import importlib.util
import math
import os

import pytest
import torch
from block_sparse_calls import block_sparse_attention
from layouts import check_layouts
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.api import pack
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Segments
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

TRITON = impls.named("triton")
PACKING = TRITON.packing
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
THOROUGH = pytest.mark.thorough if INTERPRETED else ()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if NATIVE else [])]
TILES = {"tile_q": (2, 2, 4), "tile_k": (1, 4, 4)}

# Pairwise over: grid and its length, products and bands, dilation and causality, raster and tiles that do not divide
# the grid, lists per head, text and where it lies with a length per sample, head size, input size. Small: under the
# interpreter every vector operation costs.
CASES = {
    "one-token": {"shape": (1, 1, 1), "dim": 64, "heads": 1},
    "63-text": {"shape": (1, 7, 9), "dim": 40, "text": 5, "text_lens": [2, 5], "batch": 2, "heads": 1, "size": 4.0},
    "64-one-block": {"shape": (1, 8, 8), "dim": 72, "block_q": 64, "block_k": 64, "heads": 1},
    "65-ragged": {"shape": (1, 5, 13), "dim": 96, "block_q": 64, "block_k": 32, "heads": 1, "size": 16.0},
    "sliding-raster": {"shape": (2, 4, 5), "method": "gna", "config": {"window": (2, 3, 3)}, "heads": 1},
    "sliding-tiled": dict(
        shape=(2, 5, 6), method="gna", config={"window": (2, 3, 4)}, heads=1, dim=64, size=4.0, **TILES
    ),
    "causal-between": {
        "shape": (2, 4, 5),
        "method": "gna",
        "config": {"window": (2, 3, 3), "causal": (True, False, True)},
        "text": 5,
        "conditioning": 3,
        "between": True,
        "per_sample": True,
        "gap": 2,
        "text_lens": [0, 3],
        "batch": 2,
        "heads": 1,
        "size": 16.0,
    },
    "dilated-tiled": dict(
        shape=(1, 8, 6), method="gna", config={"window": (1, 3, 2), "dilation": (1, 2, 3)}, heads=1, dim=128, **TILES
    ),
    "dilated-raster": {
        "shape": (1, 7, 6),
        "method": "gna",
        "config": {"window": (1, 2, 2), "dilation": (1, 3, 2)},
        "heads": 1,
    },
    "radial-128-keys": {
        "shape": (4, 5, 7),
        "method": "radial",
        "config": {"decay": 0.4},
        "block_q": 64,
        "block_k": 128,
        "heads": 1,
    },
    "radial-tiled": dict(
        shape=(4, 4, 3), method="radial", config={"decay": 0.5}, text=4, text_lens=[1], heads=1, **TILES
    ),
    "tile-method": {"shape": (4, 3, 5), "method": "tile", "config": {"references": 1}, "conditioning": 4, "heads": 1},
    "heads-text": {"shape": (3, 3, 5), "topk": 2, "text": 5, "text_lens": [3, 5], "batch": 2, "heads": 2, "dim": 40},
    "heads-tiles-ragged": dict(shape=(3, 5, 3), topk=2, heads=2, dim=64, size=16.0, **TILES),
    "heads-partial": {
        "shape": (3, 4, 5),
        "method": "gna",
        "config": {"window": (1, 3, 3)},
        "per_head": True,
        "heads": 2,
        "text": 3,
    },
    "scale-below-0": {"shape": (2, 3, 5), "method": "gna", "config": {"window": (2, 3, 3)}, "heads": 1, "scale": -0.3},
    "scale-0": {"shape": (1, 3, 7), "heads": 1, "scale": 0.0, "size": 16.0},
    "queries-longer": {"shape": (1, 3, 8), "query_grid": (2, 3, 8), "topk": 1, "heads": 2, "dim": 64},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_are_within_the_budget(make_problem, case, dtype):
    if dtype == torch.float16 and INTERPRETED and case not in ("63-text", "65-ragged", "heads-text"):
        pytest.skip("half precision is interpreted on a few cases: the arithmetic is the same")
    make_problem(**CASES[case]).check("triton", dtype)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the launch table says how many rows a step has")
@pytest.mark.parametrize("case", ["65-ragged", "radial-128-keys"])
def test_blocks_in_steps(make_problem, case, monkeypatch):
    """Some architectures take a listed block in parts: here two of 32 keys, four of 128, two or four of the queries."""
    from dit_accel.kernels.block_sparse import triton, triton_configs

    launch = triton_configs.Launch(warps=4, stages=1, step=max(16, CASES[case]["block_k"] // 4))
    monkeypatch.setattr(triton, "launches", lambda *sizes: iter([launch]))
    make_problem(**CASES[case]).check("triton", torch.float32)


# Tiles within a word, across two words and of one image row; bands and products in raster order, dilated, per head
OF_128 = {"shape": (3, 5, 9), "tile_q": (2, 4, 8), "tile_k": (2, 8, 8), "block_q": 64, "block_k": 128, "heads": 1}
PLACED = TokenGrid(3, 6, 9, text=20, conditioning=5)
WORDS = {name: CASES[name] for name in ("dilated-raster", "dilated-tiled", "radial-128-keys", "heads-partial")} | {
    "tiles-of-128": {"method": "gna", "config": {"window": (2, 5, 4), "dilation": (1, 1, 2)}, **OF_128},
    "radial-tiles-of-128": {"method": "radial", "config": {"decay": 0.5}, **OF_128},
    "one-row-of-128": {
        "shape": (1, 2, 150),
        "method": "gna",
        "config": {"window": (1, 2, 70)},
        "tile_q": (1, 1, 16),
        "tile_k": (1, 1, 128),
        "block_q": 16,
        "block_k": 128,
        "heads": 1,
    },
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=THOROUGH if name in ("dilated-tiled", "tiles-of-128") else ()) for name in WORDS]
)
def test_words_are_the_predicate_bit_by_bit(make_problem, case):
    from dit_accel.kernels.block_sparse import triton, triton_lists

    problem = make_problem(**WORDS[case])
    geometry, options = problem.geometry(), problem.options
    here = problem.to("cuda") if NATIVE else problem
    lists = triton_lists.order_lists(here.block_lists(), geometry)
    call = BlockSparseInputs(here.q, here.k, here.v, here.block_lists(), Segments(), geometry, 1.0)
    words = triton.BlockSparseLaunches(call).with_words(lists).words.cpu()
    bits = (words[..., None] >> torch.arange(64)) & 1  # [blocks, words, BLOCK_Q, 64]
    bits = bits.transpose(1, 2).flatten(2)[..., : geometry.block_k].bool()
    allowed = reference.allowed_pairs(options["tables"], geometry)
    slots_q = geometry.query_order.index().view(-1, geometry.block_q)
    slots_k = geometry.key_order.index().view(-1, geometry.block_k)
    entries, numbers = lists.entries.cpu(), lists.numbers().cpu()
    assert numbers[numbers >= 0].tolist() == list(range(options["partial_blocks"]))
    for row, place in (numbers >= 0).nonzero().tolist():
        q, k = slots_q[row % len(slots_q)], slots_k[entries[row, place]]
        want = allowed[q[q >= 0]][:, k.clamp(min=0)] & (k >= 0)
        assert torch.equal(bits[numbers[row, place]][q >= 0], want), (row, place)


@pytest.mark.parametrize("order", [TokenOrder(PLACED, 16), TokenOrder(PLACED, 16, (1, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)], ids=["shared", "per head"])
def test_lists_are_placed_as_a_sort_orders_them(order, shape):
    """Whole blocks first, in order; then the others, in order; both lengths of a list, and none."""
    from dit_accel.kernels.block_sparse import triton_lists
    from dit_accel.kernels.block_sparse.triton_places import place_lists

    device = "cuda" if NATIVE else "cpu"
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(*shape, order.blocks, generator=generator).argsort(-1).int()
    counts = torch.randint(0, order.blocks + 1, shape, generator=generator, dtype=torch.int32)
    counts.flatten()[:2] = torch.tensor([0, order.blocks])
    indices[torch.arange(order.blocks) >= counts[..., None]] = 10**6  # not to be read
    lists = BlockLists(indices, counts)
    queries = TokenOrder(TokenGrid(1, 1, shape[-1]), 1)
    geometry = dataclasses.replace(Geometry.of(queries, order), own_queries=True, query_grid=(1, 1, shape[-1]))
    wanted = triton_lists.order_lists(lists, geometry)
    places, spans = place_lists(indices.to(device), counts.to(device), order)
    assert places.shape == indices.shape and torch.equal(spans.cpu().view(-1, 5), wanted.spans)
    rows = zip(places.cpu().view(-1, order.blocks), wanted.places, wanted.spans.tolist(), strict=True)
    for row, want, (_, _, _, count, _) in rows:
        assert torch.equal(row[:count], want[:count])
    visual = torch.arange(order.visual_blocks, dtype=torch.int32).expand(*shape, -1)
    places, spans = place_lists(visual.to(device), None, order, order.dense_blocks)
    every = triton_lists.order_lists(BlockLists.full(torch.arange(order.blocks, dtype=torch.int32)[None]), geometry)
    assert torch.equal(spans.cpu().view(-1, 5), every.spans.expand(math.prod(shape), -1))
    assert torch.equal(places.cpu().view(-1, order.blocks)[0], every.places[0])


def test_room_for_words_is_what_was_said(make_problem):
    """More partial blocks than the caller said are an error; none said is room for all."""
    problem = make_problem(**CASES["sliding-raster"])
    if NATIVE:
        problem = problem.to("cuda")
    blocks = problem.options["partial_blocks"]
    assert blocks > 0
    assert torch.equal(problem.call("triton"), problem.call("triton", partial_blocks=None))
    with pytest.raises(DitAccelError, match="partial_blocks"):
        problem.call("triton", partial_blocks=-1)
    if INTERPRETED:  # on a GPU the assertion ends the process's CUDA context
        with pytest.raises(RuntimeError, match=f"partial_blocks={blocks - 1}"):
            problem.call("triton", partial_blocks=blocks - 1)


PACKED = (
    "65-ragged",
    pytest.param("causal-between", marks=THOROUGH),
    pytest.param("dilated-tiled", marks=THOROUGH),
    "radial-128-keys",
    "tile-method",
)


@pytest.mark.parametrize("case", PACKED)
def test_lists_packed_once_are_those_of_each_call(make_problem, case):
    problem = make_problem(**CASES[case])
    unpacked = problem.run("triton", torch.float32)
    here = problem.to("cuda") if NATIVE else problem
    packed = pack(here.block_lists(), here.geometry(), PACKING)
    for tensor in here.lists:
        tensor.zero_()  # they are not looked at again
    problem.options["packed"] = packed.cpu()
    once = dataclasses.replace(problem, lists=tuple(tensor.cpu() for tensor in here.lists)).run("triton", torch.float32)
    for name, result in unpacked.items():
        assert torch.equal(once[name], result), name


def test_packed_lists_must_fit(make_problem):
    problem = make_problem(**CASES["sliding-raster"])
    here = problem.to("cuda") if torch.cuda.is_available() else problem
    with pytest.raises(DitAccelError, match=names("packed", "pack()", "int32")):
        here.call("triton", packed=torch.zeros(7, dtype=torch.int32, device=here.q.device))
    with pytest.raises(DitAccelError, match="more than partial_blocks=1"):
        pack(problem.block_lists(), dataclasses.replace(problem.geometry(), partial_blocks=1), PACKING)
    heads = make_problem(**CASES["heads-text"])
    with pytest.raises(DitAccelError, match="can be packed"):
        pack(heads.block_lists(), heads.geometry(), PACKING)


@pytest.mark.parametrize("method", ["gna", "tile", "radial"])
def test_a_plan_packs_its_lists_once(method, monkeypatch):
    """Before the first call; packed or not, the results are the same bits."""
    config = {"gna": {"window": (3, 3, 4)}, "tile": {"references": 1}, "radial": {"rule": "released", "block": 16}}
    grid = dit_accel.TokenGrid(3, 4, 6, text=5)
    device = torch.device("cuda" if NATIVE else "cpu")
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 16, device=device, requires_grad=True).unbind()
    results = []
    for packing in (None, PACKING):
        monkeypatch.setitem(impls._TABLE, (impls.BLOCK_SPARSE, "triton"), dataclasses.replace(TRITON, packing=packing))
        plan = dit_accel.plan(method, grid, **config[method])
        plan.prepare(device, torch.float32, 16, "triton")
        assert (plan.lists(device, packing).packed is not None) == (packing is not None)
        out = dit_accel.attention(q, k, v, plan, impl="triton")
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["63-text", "heads-text", pytest.param("causal-between", marks=THOROUGH)])
def test_poison_in_padding_reaches_nothing(make_problem, case):
    problem = make_problem(**CASES[case])
    clean = problem.run("triton", torch.float32)
    first = problem.options["text_start"][0] + problem.options["text_len"][0]
    last = problem.options["text_start"][0] + problem.options["text"]
    for tensor in (problem.k, problem.v):
        tensor[0, :, first:last] = float("nan")
    poisoned = problem.run("triton", torch.float32)
    for name, result in clean.items():
        assert torch.equal(result, poisoned[name]), name


@pytest.mark.parametrize("case", [pytest.param("causal-between", marks=THOROUGH), "heads-text"])
def test_what_no_kernel_writes_is_not_read(make_problem, case):
    """Rows of no segment and padding text have no delta: memory made by `torch.empty` holds NaN here."""
    problem = make_problem(**CASES[case])
    clean = problem.run("triton", torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        filled = problem.run("triton", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, result in clean.items():
        assert torch.equal(result, filled[name]), name


def test_a_row_without_keys_is_zero(make_problem):
    problem = make_problem(shape=(1, 4, 8), topk=1, heads=1)
    problem.lists[1][..., 0] = 0
    results = problem.run("triton", torch.float32)
    assert not results["out"][:, :, :16].any()
    assert not results["dq"][:, :, :16].any()
    assert all(result.isfinite().all() for result in results.values())


def test_ten_runs_are_bit_equal(make_problem):
    problem = make_problem(shape=(2, 4, 5), method="gna", config={"window": (1, 3, 3)}, heads=1)
    first = problem.run("triton", torch.float32)
    for _ in range(9 if NATIVE else 1):
        for name, result in problem.run("triton", torch.float32).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("strided", [False, True])
def test_strides_do_not_matter(make_problem, strided):
    """The model hands over [B, N, H, D] tensors with heads moved; rows that are no multiple of 16 bytes work too."""
    problem = make_problem(shape=(1, 4, 5), heads=2, dim=24)
    here = problem.to("cuda") if NATIVE else problem

    def results():
        leaves = [x.detach().requires_grad_() for x in (here.q, here.k, here.v)]
        out = block_sparse_attention(*leaves, *here.lists, impl="triton", **here.options)
        return out, *torch.autograd.grad(out, leaves, here.grad_out)

    expected = results()
    for name in ("q", "k", "v", "grad_out"):
        tensor = getattr(here, name)
        if strided:
            moved = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            moved = torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
        setattr(here, name, moved)
    for name, result, want in zip(("out", "dq", "dk", "dv"), results(), expected, strict=True):
        assert torch.equal(result, want), name


def test_what_the_kernels_cannot_do_is_refused(make_problem):
    problem = make_problem(shape=(1, 4, 6), heads=1, block_q=24, block_k=8)
    with pytest.raises(DitAccelError, match=names("16, 32, 64", 128, 24)):
        problem.call("triton")
    with pytest.raises(DitAccelError, match="float64"):
        make_problem(shape=(1, 4, 4), heads=1).call("triton", torch.float64)
    if INTERPRETED:
        with pytest.raises(DitAccelError, match="no bfloat16"):
            make_problem(shape=(1, 4, 4), heads=1).call("triton", torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_is_registered(make_problem, packed):
    problem = make_problem(shape=(1, 4, 6), heads=1)
    if NATIVE:
        problem = problem.to("cuda")
    if packed:
        problem.options["packed"] = pack(problem.block_lists(), problem.geometry(), PACKING)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, *problem.lists, impl="triton", **problem.options)

    assert torch.equal(attend(problem.q, problem.k, problem.v), problem.call("triton"))


@pytest.mark.parametrize(("heads", "visual", "dense"), [(3, 5, 2), (2, 1, 4), (5, 3, 0), (1, 7, 1)])
def test_dense_blocks_of_all_heads_come_first(heads, visual, dense):
    """Then the others head by head; every block of every head has one program."""
    from program_order import order_kernel

    blocks = visual + dense
    order = torch.full((heads * blocks, 2), -1, dtype=torch.int32, device="cuda" if NATIVE else "cpu")
    order_kernel[blocks, heads](order, blocks, dense)
    first = [[block, head] for head in range(heads) for block in range(visual, blocks)]
    assert order.tolist() == first + [[block, head] for head in range(heads) for block in range(visual)]


def test_the_strides_do_not_matter():
    check_layouts(dit_accel.plan("gna", TokenGrid(2, 4, 4), window=(2, 3, 2)), "triton")


@pytest.mark.skipif(NATIVE, reason="takes 2 GB of addresses, which a GPU would have to hold")
def test_entries_of_many_heads_are_counted_beyond_32_bits(monkeypatch):
    """dk and dv of a head whose lists stand behind 2^29 entries of other heads: four steps an entry pass 2^31."""
    from dit_accel.kernels.block_sparse import triton

    torch.manual_seed(0)
    grid = TokenGrid(1, 1, 256)
    q, k, v, grad_out = torch.randn(4, 1, 1, 256, 16)
    indices = torch.tensor([[[[0, 2, 0, 0], [1, 2, 3, 0]]]], dtype=torch.int32)
    lists = BlockLists(indices, torch.tensor([[[2, 3]]], dtype=torch.int32))
    call = BlockSparseInputs(q, k, v, lists, Segments(), Geometry.of(TokenOrder(grid, 128), TokenOrder(grid, 64)), 0.25)
    out, lse = triton.forward(call)
    wanted = triton.backward(grad_out, None, out, lse, call)
    ordered, transposed = triton.BlockSparseLaunches(call, grad_out, out).both_ways()
    ahead, places = 2**29, transposed.places
    behind = torch.empty(ahead + len(places), dtype=torch.int32)  # its pages are not touched before `ahead`
    behind[ahead:] = places
    shifted = transposed._replace(entries=behind, places=behind, firsts=transposed.firsts + ahead)
    monkeypatch.setattr(triton.BlockSparseLaunches, "both_ways", lambda launches: (ordered, shifted))
    actual = triton.backward(grad_out, None, out, lse, call)
    assert all(torch.equal(*pair) for pair in zip(actual, wanted, strict=True))
