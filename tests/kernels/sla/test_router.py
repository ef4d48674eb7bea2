"""The router against a ranking by hand, and what it must hold whatever comes in."""

import pytest
import torch

from dit_accel.kernels.sla import portable
from dit_accel.kernels.sla.call import Cut, from_blocks, to_blocks
from dit_accel.kernels.sla.portable import highest, lowest, route

# grid, block, tile: one block, whole blocks, ragged tails, tiles with and without cut-off borders
LAYOUTS = {
    "one token": ((1, 1, 1), 64, None),
    "one ragged block": ((1, 1, 63), 64, None),
    "one whole block": ((1, 8, 8), 64, None),
    "one token over": ((1, 1, 65), 64, None),
    "ragged": ((3, 5, 7), 8, None),
    "whole tiles": ((2, 4, 8), 16, (2, 2, 4)),
    "cut tiles": ((3, 5, 7), 16, (2, 2, 4)),
    "tile above the grid": ((1, 3, 5), 64, (4, 4, 4)),
}


def rank_by_hand(q, k, order):
    """Key blocks of every query block, best first: int64 [B, H, blocks, blocks]."""
    means = []
    for x in (q, k):
        slots = order.index().reshape(order.visual_blocks, order.block)
        means.append(torch.stack([x[:, :, row[row >= 0]].double().mean(2) for row in slots], dim=2))
    scores = means[0] @ means[1].mT
    return scores.argsort(dim=-1, descending=True, stable=True)


@pytest.mark.parametrize("grid, block, tile", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_critical_are_the_best_and_negligible_the_worst(grid, block, tile, dtype):
    torch.manual_seed(0)
    order = Cut(grid, block, tile).order
    q, k = (torch.randn(2, order.grid.visual, 3, 40, dtype=dtype).transpose(1, 2) for _ in range(2))
    blocks = order.visual_blocks
    best = rank_by_hand(q, k, order)
    for topk, skip in {(1, 0), (max(1, blocks // 3), blocks // 4), (blocks, 0), (1, blocks - 1)}:
        critical, negligible = route(q, k, Cut(grid, block, tile).pack(), topk, skip)
        assert critical.dtype == negligible.dtype == torch.int32
        assert torch.equal(critical.long(), best[..., :topk].sort(-1).values)
        assert torch.equal(negligible.long(), best[..., blocks - skip :].sort(-1).values)


def test_scores_are_fp32_for_bf16():
    """Means that differ by less than bf16 can say: 1 and 1 + 2**-10 are the same number there."""
    k = torch.ones(1, 1, 2 * 8, 1, dtype=torch.bfloat16)
    k[:, :, 8] += 2**-7
    critical, _ = route(torch.ones_like(k), k, Cut((1, 1, 16), 8, None).pack(), 1, 0)
    assert critical.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
def test_ties_go_to_the_first_blocks(tile):
    q = torch.ones(1, 2, 4 * 16, 8)
    critical, negligible = route(q, q, Cut((1, 4, 16), 8, tile).pack(), 3, 2)
    assert (critical == torch.tensor([0, 1, 2])).all()
    assert (negligible == torch.tensor([6, 7])).all()


def test_partial_ties():
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0], [0.0, -0.0, 0.0, -0.0, 5.0, 0.0, 0.0, -0.0]])
    assert highest(scores, 3).tolist() == [[0, 1, 3], [0, 1, 4]]
    assert lowest(scores, 4).tolist() == [[4, 5, 6, 7], [3, 5, 6, 7]]


def test_random_ties_partition_exactly():
    """Critical, negligible and marginal blocks cover every block once, whatever the ties."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (500, 13), generator=generator).float()
    best = scores.argsort(dim=-1, descending=True, stable=True)
    for topk, skip in ((1, 0), (5, 8), (4, 3), (13, 0)):
        critical, negligible = highest(scores, topk).long(), lowest(scores, skip).long()
        assert torch.equal(critical, best[:, :topk].sort(-1).values)
        assert torch.equal(negligible, best[:, 13 - skip :].sort(-1).values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lists_stay_within_bounds_for_bad_values(bad):
    """A kernel reads memory by these lists, so even a broken input gives as many blocks as asked for, each once."""
    q = torch.randn(1, 2, 64, 8)
    for place in (q[0, 0, 5], q[0, 1]):
        place.fill_(bad)
        critical, negligible = route(q, q, Cut((1, 1, 64), 8, None).pack(), 3, 2)
        lists = torch.cat([critical, negligible], dim=-1)
        assert lists.min() >= 0 and lists.max() < 8
        assert all(len(set(row)) == 5 for row in lists.flatten(0, 2).tolist())


def test_runs_and_layouts_agree():
    q, k = torch.randn(2, 1, 3, 200, 16)
    first = route(q, k, Cut((1, 1, 200), 16, None).pack(), 4, 3)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for _ in range(10):
        again = route(*strided, Cut((1, 1, 200), 16, None).pack(), 4, 3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_at_once_do_not_matter(monkeypatch):
    q, k = torch.randn(2, 2, 3, 200, 16)
    whole = route(q, k, Cut((1, 1, 200), 16, None).pack(), 4, 3)
    monkeypatch.setattr(portable, "_SCORES_AT_ONCE", 200)
    parts = route(q, k, Cut((1, 1, 200), 16, None).pack(), 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
def test_op_is_registered_properly(tile):
    q = torch.randn(1, 2, 30, 8)
    torch.library.opcheck(route, (q, q.clone(), Cut((1, 5, 6), 8, tile).pack(), 2, 1))


@pytest.mark.parametrize("grid, block, tile", LAYOUTS.values(), ids=LAYOUTS)
def test_blocks_and_back(grid, block, tile):
    order = Cut(grid, block, tile).order
    x = torch.randn(2, order.grid.visual, 3)
    cut = to_blocks(x, order)
    assert Cut(grid, block, tile).blocks == order.visual_blocks
    assert cut.shape == (2, order.visual_blocks, block, 3)
    assert torch.equal(from_blocks(cut, order), x)
    padding = order.index().reshape(cut.shape[1:3]) < 0
    assert (cut[:, padding] == 0).all()
