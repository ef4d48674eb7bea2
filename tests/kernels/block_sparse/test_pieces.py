"""Long lists in pieces give what whole lists give, outputs and gradients, and few lists are done sooner.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so `make test` runs this file in a process of its own.
"""

import importlib.util
import math
import os

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from roundings import assert_masked

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse import api, pieces
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


@pytest.mark.parametrize(("rows", "width", "programs"), [(48, 1861, 132), (6, 1861, 132), (96, 1032, 132)])
def test_few_long_lists_are_done_sooner_in_pieces(rows, width, programs):
    """At least a tenth sooner than whole, in waves of programs that are alike."""
    chosen = pieces.fastest(rows, width, programs)

    def blocks(count):
        return math.ceil(rows * count / programs) * (pieces.START + math.ceil(width / count))

    assert chosen > 1
    assert blocks(chosen) + pieces.MERGE <= 0.9 * blocks(1)
    assert blocks(chosen) <= 1.2 * (rows * width / programs + 8 * pieces.START)


@pytest.mark.parametrize(
    ("rows", "width", "programs"), [(1000, 1861, 132), (132, 1861, 132), (96, 264, 132), (7, 900, 1)]
)
def test_many_or_short_lists_stay_whole(rows, width, programs):
    assert pieces.fastest(rows, width, programs) == 1


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
    whole = attend_all(q, k, v, grid, arguments)
    monkeypatch.setattr(pieces, "fastest", lambda *_: 3)
    torch.testing.assert_close(attend_all(q, k, v, grid, arguments), whole, rtol=0, atol=2**-20)


def test_other_implementations_have_whole_lists(monkeypatch):
    monkeypatch.setattr(pieces, "fastest", lambda *_: 3)
    monkeypatch.setattr(api, "in_pieces", None)
    grid, tensors = TokenGrid(1, 9, 15), [torch.randn(1, 1, 135, 16) for _ in range(3)]
    out = attend_all(*tensors, grid, PlanArguments(impl="portable"))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*tensors))
    assert {row.name for row in impls.ROWS if row.kernel == impls.BLOCK_SPARSE and row.cuts} == {
        "triton", "triton8", "gluon", "gluon_triton"
    }  # fmt: skip


@TRITON
def test_the_number_of_pieces_is_found_in_a_compiled_function(monkeypatch):
    monkeypatch.setattr(pieces, "multiprocessors", lambda _: 40)
    monkeypatch.setattr(pieces, "MERGE", 0)
    grid, _, (*tensors, _), _, arguments = case_of("first")
    assert pieces.fastest(1, 6, 40) > 1
    attend = torch.compile(attend_all, fullgraph=True, backend="aot_eager")
    assert torch.equal(attend(*tensors, grid, arguments), attend_all(*tensors, grid, arguments))
