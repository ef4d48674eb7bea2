"""Long lists in pieces give what whole lists give, outputs and gradients, and few lists are done sooner.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so `make test` runs this file in a process of its own.
"""

import heapq
import importlib.util
import math
import os

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from roundings import assert_masked

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse import api, pieces
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs, Geometry, Segments
from dit_accel.plans.plan import PlanArguments
from dit_accel.plans.routed import attend_all
from dit_accel.tokens import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or NATIVE),
    reason="needs Triton, with TRITON_INTERPRET=1 or a CUDA device",
)
DEVICE = "cuda" if NATIVE else "cpu"


TRITON_START = impls.named("triton").list_start
LISTS = [(48, 1861, 132), (6, 1861, 132), (96, 1032, 132), (96, 264, 132), (7, 900, 4), (1000, 1861, 132)]


def last_end(rows, pieces, width, block_k, programs, start):
    """When the last piece is done, in keys: each goes to the program that is free first. Without the merge."""
    free = [0.0] * programs
    for _ in range(rows):
        for piece in range(pieces):
            blocks = min(math.ceil(width / pieces), max(0, width - piece * math.ceil(width / pieces)))
            heapq.heapreplace(free, free[0] + 64 * start + blocks * block_k)
    return max(free)


@pytest.mark.parametrize("block_k", [16, 64, 128])
@pytest.mark.parametrize("start", [3, 8])
@pytest.mark.parametrize(("rows", "width", "programs"), LISTS)
def test_no_other_number_of_pieces_is_done_sooner(rows, width, programs, start, block_k):
    """By programs that run one by one, beside what short last pieces may save. A tenth is the least gain."""
    width = math.ceil(width * 64 / block_k)
    chosen = pieces.fastest(rows, width, block_k, programs, start)
    counts = range(1, min(pieces.MOST, width) + 1)
    merge = 64 * pieces.MERGE
    ends = {n: last_end(rows, n, width, block_k, programs, start) + merge * (n > 1) for n in counts}
    short = {n: math.ceil(rows * n / programs) * (math.ceil(width / n) * n - width) * block_k for n in counts}
    soonest = min(ends[n] + short[n] for n in counts)
    assert ends[chosen] <= (soonest if chosen > 1 else soonest / pieces.LEAST)
    assert chosen == 1 or ends[chosen] <= pieces.LEAST * ends[1]


def pieces_chosen(monkeypatch, impl, block_k, tokens, heads):
    """Of one text block of queries in each head, on 132 multiprocessors."""
    monkeypatch.setattr(pieces, "multiprocessors", lambda _: 132)
    width = math.ceil(tokens / block_k)
    geometry = Geometry((1, 1, tokens), (1, 1, 100), 128, block_k, None, None, 0, 0, own_queries=True)
    q, k = (torch.empty(1, heads, n, 64, device="meta") for n in (100, tokens))
    lists = BlockLists.full(torch.arange(width, dtype=torch.int32)[None])
    call = BlockSparseInputs(q, k, k, lists, Segments(), geometry, 1.0)
    return pieces.pieces_of(call, impls.named(impl))


@pytest.mark.parametrize(("heads", "tokens", "want"), [(48, 119056, 11), (96, 66000, 4), (24, 3000, 1), (96, 17776, 1)])
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
def test_the_number_of_pieces_follows_from_keys_not_from_blocks(monkeypatch, heads, tokens, want, block_k):
    assert pieces_chosen(monkeypatch, "triton", block_k, tokens, heads) == want


def test_lists_that_are_loaded_early_have_more_pieces(monkeypatch):
    more, fewer = (pieces_chosen(monkeypatch, impl, 64, 66000, 96) for impl in ("gluon_triton", "triton"))
    assert more > fewer > 1


def test_no_list_has_more_pieces_than_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "MERGE", 0)
    assert pieces.fastest(1, 2, 128, 132, 0) == 2


def test_tiles_of_queries_are_not_cut_in_pieces():
    geometry = Geometry((1, 1, 64), (1, 4, 4), 16, 16, (1, 4, 4), None, 0, 0, own_queries=True)
    q, k = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 64, 16)
    lists = BlockLists.full(torch.arange(4, dtype=torch.int32)[None])
    with pytest.raises(AssertionError):
        pieces.in_pieces(BlockSparseInputs(q, k, k, lists, Segments(), geometry, 1.0), 2)


@pytest.mark.parametrize(
    ("rows", "width", "programs"), [(1000, 1861, 132), (132, 1861, 132), (96, 264, 132), (7, 900, 1)]
)
def test_many_or_short_lists_stay_whole(rows, width, programs):
    assert pieces.fastest(rows, width, 64, programs, TRITON_START) == 1


# Text behind and before, lengths per sample, none valid; odd counts of rows and keys; pieces that do not divide the
# blocks, more pieces than blocks, pieces without any valid key; both head sizes
CASES = {
    "behind": (TokenGrid(1, 10, 21, text=70), 70, {"batch": 2, "text_lens": [3, 70], "dim": 64}, 3),
    "first": (TokenGrid(2, 9, 15, text=33, text_first=True), 33, {"dim": 128}, 4),
    "no-valid-text": (TokenGrid(1, 8, 9, text=200), 130, {"batch": 2, "text_lens": [0, 1], "dim": 64}, 5),
    "conditioning": (TokenGrid(1, 7, 13, text=5, conditioning=91), 1, {"dim": 64, "heads": 2}, 2),
    "one-block-a-piece": (TokenGrid(1, 5, 50), 129, {"dim": 64}, 4),
}


def case_of(name):
    """The grid, pieces, q, k, v and a gradient in fp32, which keys are valid, and the arguments."""
    grid, rows, more, count = CASES[name]
    batch, heads, lens = more.get("batch", 1), more.get("heads", 1), more.get("text_lens")
    generator = torch.Generator().manual_seed(0)
    sizes = rows, grid.tokens, grid.tokens, rows
    tensors = [torch.randn(batch, heads, n, more["dim"], generator=generator).to(DEVICE) for n in sizes]
    valid = torch.ones(batch, 1, rows, grid.tokens, dtype=torch.bool, device=DEVICE)
    for sample, length in enumerate(lens or ()):
        valid[sample, :, :, grid.text_start + length : grid.text_start + grid.text] = False
    lens = None if lens is None else torch.tensor(lens, device=DEVICE)
    return grid, count, tensors, valid, PlanArguments(text_lens=lens, impl="triton")


@TRITON
@pytest.mark.parametrize("case", CASES)
def test_rows_over_all_keys_and_their_gradients_are_within_the_budget(monkeypatch, case):
    grid, count, (*tensors, gradient), valid, arguments = case_of(case)
    seen = []
    monkeypatch.setattr(pieces, "fastest", lambda *sizes: seen.append(sizes) or count)
    assert_masked(lambda *x: attend_all(*x, grid, arguments), tensors, gradient, valid)
    key_blocks = sum(math.ceil(tokens / 64) for tokens in (grid.visual, grid.conditioning, grid.text))
    batch, heads, rows, _ = tensors[0].shape
    assert seen[0][:2] == (batch * heads * math.ceil(rows / 128), key_blocks)


@TRITON
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_within_the_budget(monkeypatch, case):
    """A piece is rounded too: no piece's output is larger than the average of |v| over its keys."""
    grid, count, (*tensors, _), valid, arguments = case_of(case)
    q, k, v = (x.half() for x in tensors)
    monkeypatch.setattr(pieces, "fastest", lambda *_: count)
    scale, wide = q.shape[-1] ** -0.5, [x.double() for x in (q, k, v)]
    plain, exact = plain_attention(q, k, v, valid, scale)[0], plain_attention(*wide, valid, scale)[0]
    sizes = plain_attention(*wide[:2], wide[2].abs(), valid, scale)[0]
    assert_accurate("out", attend_all(q, k, v, grid, arguments), plain, exact, sizes)


@TRITON
def test_padding_with_a_bias_counts_once(monkeypatch):
    """Padded text that a model weighs is merged behind the pieces."""
    grid = TokenGrid(1, 9, 15, text=20)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator).to(DEVICE) for n in (20, grid.tokens, grid.tokens))
    bias = torch.randn(1, 20, generator=generator).to(DEVICE)
    arguments = PlanArguments(text_lens=torch.tensor([7], device=DEVICE), text_bias=bias, impl="triton")
    monkeypatch.setattr(pieces, "fastest", lambda *_: 3)
    padding = torch.zeros(grid.tokens, dtype=torch.bool, device=DEVICE)
    padding[grid.text_start + 7 : grid.text_start + grid.text] = True

    def defined(*tensors):
        logits = tensors[0] @ tensors[1].mT / 8 + bias.to(tensors[0]).mT * padding
        return logits.softmax(-1) @ tensors[2]

    plain, exact = defined(q, k, v), defined(*(x.double() for x in (q, k, v)))
    sizes = defined(*(x.double() for x in (q, k, v.abs())))
    # Rounded besides, in eps / 2 of an average of |v|: each piece, the padding's part, and their two sums
    assert_accurate("out", attend_all(q, k, v, grid, arguments), plain, exact, 2 * sizes)


def test_other_implementations_have_whole_lists(monkeypatch):
    monkeypatch.setattr(pieces, "fastest", lambda *_: 3)
    monkeypatch.setattr(api, "in_pieces", None)
    grid, tensors = TokenGrid(1, 9, 15), [torch.randn(1, 1, 135, 16) for _ in range(3)]
    out = attend_all(*tensors, grid, PlanArguments(impl="portable"))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*tensors))
    assert {row.name for row in impls.ROWS if row.list_start is not None} == {
        "triton", "triton8", "gluon", "gluon_triton"
    }  # fmt: skip


@TRITON
def test_the_number_of_pieces_is_found_in_a_compiled_function(monkeypatch):
    monkeypatch.setattr(pieces, "multiprocessors", lambda _: 40)
    monkeypatch.setattr(pieces, "MERGE", 0)
    grid, _, (*tensors, _), _, arguments = case_of("first")
    assert pieces.fastest(1, 6, 64, 40, TRITON_START) > 1
    attend = torch.compile(attend_all, fullgraph=True, backend="aot_eager")
    assert torch.equal(attend(*tensors, grid, arguments), attend_all(*tensors, grid, arguments))
