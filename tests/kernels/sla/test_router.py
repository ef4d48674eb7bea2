"""The router against a ranking by hand, and what it must hold whatever comes in."""

import pytest
import torch
from sla_calls import cuts_of, route

from dit_accel.kernels.cuts import from_blocks, to_blocks
from dit_accel.kernels.router import portable
from dit_accel.kernels.router.api import classify
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.order import TokenOrder
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

# grid, block, tile and those of queries: one block, whole blocks, ragged tails, tiles with and without cut-off borders
LAYOUTS = {
    "one token": ((1, 1, 1), 64),
    "one ragged block": ((1, 1, 63), 64),
    "one whole block": ((1, 8, 8), 64),
    "one token over": ((1, 1, 65), 64),
    "ragged": ((3, 5, 7), 8),
    "wide queries": ((3, 5, 7), 8, None, 16),
    "narrow queries": ((3, 5, 7), 16, None, 4),
    "one wide block": ((1, 1, 65), 64, None, 128),
    "wide tiles": ((3, 5, 7), 16, (2, 2, 4), 32, (2, 4, 4)),
    "whole tiles": ((2, 4, 8), 16, (2, 2, 4)),
    "cut tiles": ((3, 5, 7), 16, (2, 2, 4)),
    "tile above the grid": ((1, 3, 5), 64, (4, 4, 4)),
}


def rank_by_hand(q, k, cuts):
    """Key blocks of every query block, best first: int64 [B, H, query blocks, key blocks]."""
    means = []
    for x, order in ((q, cuts.query_order), (k, cuts.key_order)):
        slots = order.index().reshape(order.visual_blocks, order.block)
        means.append(torch.stack([x[:, :, row[row >= 0]].double().mean(2) for row in slots], dim=2))
    scores = means[0] @ means[1].mT
    return scores.argsort(dim=-1, descending=True, stable=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_critical_are_the_best_and_negligible_the_worst(layout, dtype):
    torch.manual_seed(0)
    cuts = cuts_of(*layout)
    order = cuts.key_order
    q, k = (torch.randn(2, order.grid.visual, 3, 40, dtype=dtype).transpose(1, 2) for _ in range(2))
    blocks = order.visual_blocks
    best = rank_by_hand(q, k, cuts)
    for topk, skip in {(1, 0), (max(1, blocks // 3), blocks // 4), (blocks, 0), (1, blocks - 1)}:
        critical, negligible = route(q, k, cuts, topk, skip)
        assert critical.dtype == negligible.dtype == torch.int32
        assert torch.equal(critical.long(), best[..., :topk].sort(-1).values)
        assert torch.equal(negligible.long(), best[..., blocks - skip :].sort(-1).values)


def test_blocks_of_128_queries_and_64_keys_by_hand():
    """Keys of 1,000 tokens in 16 blocks whose means are given, the tail's over its own 40; two kinds of queries."""
    of_keys = torch.tensor([3.0, -5, 8, 0, 1, -2, 7, 2, -8, 4, -1, 5, -4, 6, -7, 9])
    k = of_keys.repeat_interleave(64)[:1000].view(1, 1, 1000, 1)
    k[:, :, ::2] += 1  # means do not change: every block has as many tokens of either kind
    k[:, :, 1::2] -= 1
    q = torch.ones(1, 1, 1000, 1)
    q[:, :, 128:256] = -1
    q[:, :, 896:] = -0.5  # the tail of 104
    critical, negligible = route(q, k, cuts_of((1, 1, 1000), 64, block_q=128), 2, 1)
    assert critical[0, 0].tolist() == [[2, 15], [8, 14], *[[2, 15]] * 5, [8, 14]]
    assert negligible[0, 0].tolist() == [[8], [15], *[[8]] * 5, [15]]


def published_map(q, k, ratio, block_q, block_k):
    """The critical blocks as TurboDiffusion's code chooses them (turbodiffusion/SLA/utils.py), in fp64: bool map.

    Keys lose their mean over the sequence; a block's mean is over the tokens that it has; scores have no scale.
    """

    def means(x, block):
        return torch.stack([x[..., first : first + block, :].mean(-2) for first in range(0, x.shape[-2], block)], -2)

    scores = means(q.double(), block_q) @ means(k.double() - k.double().mean(-2, keepdim=True), block_k).mT
    count = min(scores.shape[-1], int(ratio * scores.shape[-1]))
    return torch.zeros(scores.shape).scatter(-1, scores.topk(count).indices, 1) > 0


@pytest.mark.parametrize("block_q, block", [(128, 64), (64, 64), (64, 128)])
@pytest.mark.parametrize("tokens", [1300, 2048, 1409])
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3])
def test_the_critical_blocks_are_those_of_the_published_code(block_q, block, tokens, ratio):
    """TurboDiffusion's blocks, 128x64, and SageSLA's on compute capability 9.0, 64x128, with their published shares."""
    torch.manual_seed(tokens)
    q, k = (torch.randn(1, 2, tokens, 16) + torch.randn(1, 2, 1, 16) for _ in range(2))
    module = SparseLinearAttention(16, topk=ratio, block=block, block_q=block_q)
    critical = module.route(q, k).critical
    assert torch.equal(critical.dense(), published_map(q, k, ratio, block_q, block))


def test_published_counts():
    """Wan 2.1 at 480p and at 720p, 128x64: query blocks, key blocks, and the critical ones of 10 % and 15 %."""
    for tokens, want in ((32760, (256, 512, 51, 76)), (75600, (591, 1182, 118, 177))):
        plans = [plan("sla", TokenGrid(1, 1, tokens), topk=share, block_q=128) for share in (0.1, 0.15)]
        blocks = plans[0].query_order.blocks, plans[0].key_order.blocks
        assert (*blocks, *(p.config.counts(blocks[1]).topk for p in plans)) == want


def test_scores_are_fp32_for_bf16():
    """Means that differ by less than bf16 can say: 1 and 1 + 2**-10 are the same number there."""
    k = torch.ones(1, 1, 2 * 8, 1, dtype=torch.bfloat16)
    k[:, :, 8] += 2**-7
    critical, _ = route(torch.ones_like(k), k, cuts_of((1, 1, 16), 8, None), 1, 0)
    assert critical.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
def test_ties_go_to_the_first_blocks(tile):
    q = torch.ones(1, 2, 4 * 16, 8)
    critical, negligible = route(q, q, cuts_of((1, 4, 16), 8, tile), 3, 2)
    assert (critical == torch.tensor([0, 1, 2])).all()
    assert (negligible == torch.tensor([6, 7])).all()


def of_scores(scores, topk, skip):
    """What is chosen of these scores: int64 [rows, topk] and [rows, skip]."""
    rows = torch.eye(len(scores)).expand(1, 1, -1, -1)
    orders = (TokenOrder(TokenGrid(1, 1, n), 1) for n in scores.shape)
    return (chosen[0, 0].long() for chosen in classify(rows, scores.mT[None, None], *orders, topk, skip, "portable"))


def test_partial_ties():
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0], [0.0, -0.0, 0.0, -0.0, 5.0, 0.0, 0.0, -0.0]])
    critical, negligible = of_scores(scores, 3, 4)
    assert critical.tolist() == [[0, 1, 3], [0, 1, 4]]
    assert negligible.tolist() == [[4, 5, 6, 7], [3, 5, 6, 7]]


def test_random_ties_partition_exactly():
    """Critical, negligible and marginal blocks cover every block once, whatever the ties."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (500, 13), generator=generator).float()
    best = scores.argsort(dim=-1, descending=True, stable=True)
    for topk, skip in ((1, 0), (5, 8), (4, 3), (13, 0)):
        critical, negligible = of_scores(scores, topk, skip)
        assert torch.equal(critical, best[:, :topk].sort(-1).values)
        assert torch.equal(negligible, best[:, 13 - skip :].sort(-1).values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lists_stay_within_bounds_for_bad_values(bad):
    """A kernel reads memory by these lists, so even a broken input gives as many blocks as asked for, each once."""
    q = torch.randn(1, 2, 64, 8)
    for place in (q[0, 0, 5], q[0, 1]):
        place.fill_(bad)
        critical, negligible = route(q, q, cuts_of((1, 1, 64), 8, None), 3, 2)
        lists = torch.cat([critical, negligible], dim=-1)
        assert lists.min() >= 0 and lists.max() < 8
        assert all(len(set(row)) == 5 for row in lists.flatten(0, 2).tolist())


def test_runs_and_layouts_agree():
    q, k = torch.randn(2, 1, 3, 200, 16)
    first = route(q, k, cuts_of((1, 1, 200), 16, None), 4, 3)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for _ in range(10):
        again = route(*strided, cuts_of((1, 1, 200), 16, None), 4, 3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_at_once_do_not_matter(monkeypatch):
    q, k = torch.randn(2, 2, 3, 200, 16)
    whole = route(q, k, cuts_of((1, 1, 200), 16, None), 4, 3)
    monkeypatch.setattr(portable, "_SCORES_AT_ONCE", 200)
    parts = route(q, k, cuts_of((1, 1, 200), 16, None), 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_blocks_and_back(layout):
    order = cuts_of(*layout).query_order
    x = torch.randn(2, order.grid.visual, 3)
    blocks = to_blocks(x, order)
    assert blocks.shape == (2, order.visual_blocks, order.block, 3)
    assert torch.equal(from_blocks(blocks, order), x)
    padding = order.index().reshape(blocks.shape[1:3]) < 0
    assert (blocks[:, padding] == 0).all()
