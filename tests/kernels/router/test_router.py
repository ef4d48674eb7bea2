"""The router: every implementation against the definition, and the definition against worked-out rows."""

import math

import pytest
import torch
from messages import names
from router_calls import GRIDS, RULES, SIZES, blocks, check_deviations, dense, inputs

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.router import api
from dit_accel.kernels.router.api import classify, route
from dit_accel.kernels.router.rule import Rule, thresholds
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

NAMES = ["reference", "portable"]


def one_row(scores, rule, impl):
    """What a rule lists in a row with these logits; each block has one token."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    q = torch.zeros(1, 1, len(scores), 1)
    q[..., 0, 0] = 1
    return blocks(q, scores.view(1, 1, -1, 1), rule, TokenGrid(1, 1, len(scores)), 1, 1, scale=1.0, impl=impl)[0, 0, 0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_portable_lists_what_the_definition_lists(grid, sizes, rule):
    q, k = inputs(grid, torch.float64)
    orders = TokenOrder(grid, sizes[0], sizes[2]), TokenOrder(grid, sizes[1], sizes[3])
    rule = RULES[rule](*(order.visual_blocks for order in orders))
    wanted, actual = (dense(route(q, k, *orders, rule, impl=impl), orders[1].visual_blocks) for impl in NAMES)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("impl", NAMES)
def test_rows_worked_out_by_hand(impl):
    """200 blocks: a uniform row needs the mass, a row with one peak the count (SpargeAttention2's reason)."""
    uniform, peak = torch.zeros(200), torch.zeros(200)
    peak[17] = 10  # e^10 = 22,026 of 22,225
    for scores, numbers in ((uniform, (6, 40, 40)), (peak, (6, 1, 6))):
        rules = Rule(topk=6), Rule(topp=0.2), Rule(topk=6, topp=0.2)
        rows = [one_row(scores, rule, impl) for rule in rules]
        assert tuple(int(row.sum()) for row in rows) == numbers
        assert torch.equal(rows[0] | rows[1], rows[2])
    assert one_row(uniform, Rule(topk=3), impl).nonzero().flatten().tolist() == [0, 1, 2]
    assert one_row(peak, Rule(topk=3), impl).nonzero().flatten().tolist() == [0, 1, 17]


@pytest.mark.parametrize("impl", NAMES)
def test_ties_at_the_end_of_a_mass(impl):
    """Masses 4, 2, 2, 2 and 1 of 11: six are reached by the first two, more than six by the first three."""
    scores = [math.log(2), math.log(4), math.log(2), 0.0, math.log(2)]
    assert one_row(scores, Rule(topp=5.9 / 11), impl).tolist() == [True, True, False, False, False]
    assert one_row(scores, Rule(topp=6.1 / 11), impl).tolist() == [True, True, True, False, False]
    assert one_row(scores, Rule(topp=10.1 / 11), impl).all()


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize(
    "rule", [Rule(topp=1.0), Rule(topk=6), Rule(topk=99), Rule(tau=-math.inf), Rule(similarity=2.0)]
)
def test_everything_is_listed_at_the_limits(rule, impl):
    assert one_row([0.0, -500.0, 700.0, 3.0, -0.0, 2.0], rule, impl).all()


@pytest.mark.parametrize("impl", NAMES)
def test_a_row_that_nothing_chooses_lists_its_best_block(impl):
    for rule in (Rule(), Rule(tau=50.0), Rule(topk=torch.zeros(1, dtype=torch.int32))):
        assert one_row([1.0, 5.0, 2.0, 5.0], rule, impl).tolist() == [False, True, False, False]
    assert one_row([math.nan, math.nan], Rule(tau=1.0), impl).tolist() == [True, False]


@pytest.mark.parametrize("impl", NAMES)
def test_minus_zero_is_zero_and_nan_is_first(impl):
    assert one_row([-0.0, 0.0, -1.0], Rule(topk=1), impl).tolist() == [True, False, False]
    assert one_row([-0.0, 0.0, math.nan], Rule(topk=1), impl).tolist() == [False, False, True]
    assert one_row([-math.inf, math.nan, -3.0], Rule(topk=1), impl).tolist() == [False, True, False]


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("tau, share", [(1.0, 0.1587), (1.3, 0.0968), (1.5, 0.0668), (2.0, 0.0228)])
def test_normal_scores_pass_the_threshold_as_often_as_the_normal_distribution_says(tau, share, impl):
    """Density 1 - Phi(tau), as `sol` has it without neighbours: 256 rows of 4,096 keys, 64 dimensions."""
    q, k = torch.randn(2, 1, 1, 4096, 64)
    listed = blocks(q, k, Rule(tau=tau), TokenGrid(1, 1, 4096), 16, 1, impl=impl)[0, 0]
    assert listed.shape == (256, 4096)
    assert abs(listed.double().mean() - share) < 0.005


def test_diagonal_variance_is_exact_for_uncorrelated_keys_only():
    q = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    signs = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    for _ in range(2):
        signs = torch.kron(signs, signs[:2, :2])
    k = signs[None, None, :, :8] + 3  # columns of a Hadamard matrix are orthogonal; the first is constant
    k[..., 0] = 1.5
    same = [thresholds(q, k, 1.3, exact, 0.35) for exact in (False, True)]
    torch.testing.assert_close(*same)
    k[..., 3] += 0.5 * k[..., 2]
    apart = [thresholds(q, k, 1.3, exact, 0.35) for exact in (False, True)]
    assert (apart[0] - apart[1]).abs().max() > 0.1


@pytest.mark.parametrize("impl", NAMES)
def test_the_union_holds_each_part(impl):
    grid = TokenGrid(3, 5, 7)
    q, k = torch.randn(2, 2, 3, grid.tokens, 6)
    forced = torch.rand(27, 27) < 0.1
    parts = [Rule(topk=3), Rule(topp=0.2), Rule(tau=0.5, topk=1), Rule(topk=1, forced=forced)]
    listed = [blocks(q, k, rule, grid, impl=impl) for rule in parts]
    union = blocks(q, k, Rule(topk=3, topp=0.2, tau=0.5, forced=forced), grid, impl=impl)
    assert torch.equal(union, listed[0] | listed[1] | listed[2] | listed[3])
    assert all((union != part).any() for part in listed)


@pytest.mark.parametrize("impl", NAMES)
def test_the_worst_blocks_are_listed_apart(impl):
    grid = TokenGrid(5, 7, 9, text=4, text_first=True)
    q, k = torch.randn(2, 2, 3, grid.tokens, 8)
    order = TokenOrder(grid, 16)
    lists = route(q, k, order, order, Rule(topk=5), impl=impl)
    assert lists.indices.shape[-1] == 5
    keys = order.visual_blocks
    means = [torch.stack([part.mean(-2) for part in x[:, :, 4:].split(16, -2)], -2) for x in (q, k)]
    ranked = (means[0] @ means[1].mT).argsort(-1, descending=True)
    for topk in (0, 5):
        critical, negligible = classify(q, k, order, order, topk, 3, impl)
        assert torch.equal(critical, lists.indices[..., :topk])
        assert torch.equal(negligible.long(), ranked[..., keys - 3 :].sort(-1).values)


@pytest.mark.parametrize("impl", NAMES)
def test_permuted_heads_and_samples_have_permuted_lists(impl):
    grid, rule = TokenGrid(3, 5, 7), Rule(topk=2, topp=0.3, cells=2)
    q, k = torch.randn(2, 2, 3, grid.tokens, 6)
    listed = blocks(q, k, rule, grid, impl=impl)
    turned = blocks(q.flip(0)[:, [2, 0, 1]], k.flip(0)[:, [2, 0, 1]], rule, grid, impl=impl)
    assert torch.equal(turned, listed.flip(0)[:, [2, 0, 1]])
    again = [blocks(q, k, rule, grid, impl=impl) for _ in range(3)]
    assert all(torch.equal(other, listed) for other in again)


@pytest.mark.parametrize("impl", NAMES)
def test_unlike_tokens_are_not_pooled(impl):
    """Key block 2 and query block 1 hold opposite tokens, so their means say nothing."""
    grid = TokenGrid(1, 1, 24)
    q = torch.randn(1, 1, 6, 1, 5).expand(-1, -1, -1, 4, -1).flatten(2, 3).clone()
    k = q.clone()
    q[..., 5:7, :] *= -1
    k[..., 9:11, :] *= -1
    listed = blocks(q, k, Rule(topk=1, similarity=0.9), grid, impl=impl)[0, 0]
    assert listed[1].all() and listed[:, 2].all()
    assert (listed[[0, 2, 3, 4, 5]].sum(-1) == 2).all()


def test_cells_are_the_log_of_the_sum_of_their_pairs():
    """By loops, with a last block of five tokens: two cells of four, the second of one."""
    grid = TokenGrid(1, 1, 21)
    q, k = torch.randn(2, 1, 1, 21, 3, dtype=torch.float64)
    cells = [[x[0, 0, a : min(a + 4, 21)].mean(0) for a in range(0, 21, 4)] for x in (q, k)]
    pairs = torch.tensor([[(a @ b * 0.7).exp() for b in cells[1]] for a in cells[0]])
    scores = torch.stack([sum(pairs[2 * i + a][j] for a in (0, 1)) for i in range(3) for j in range(6)]).view(3, 6)
    scores = scores[:, 0::2] + scores[:, 1::2]
    for impl in NAMES:
        listed = blocks(q, k, Rule(topk=1, cells=2), grid, 8, 8, scale=0.7, impl=impl)[0, 0]
        assert torch.equal(listed, torch.nn.functional.one_hot(scores.argmax(-1), 3).bool())


def test_the_operator_is_whole_and_compiles():
    grid = TokenGrid(3, 5, 7)
    q, k = torch.randn(2, 2, 3, grid.tokens, 6)
    order = TokenOrder(grid, 8)
    sizes = Geometry.of_visual(order, order).pack(), order.visual_blocks
    counts, shares = torch.full((1, 1, 1), 2, dtype=torch.int32), torch.rand(2, 3, order.visual_blocks)
    forced = torch.rand(order.visual_blocks, order.visual_blocks) < 0.1
    arguments = (q, k, *sizes, counts, shares, forced, 1.0, True, 1, 0.2, 0.4, order.visual_blocks, 2, "portable")
    torch.library.opcheck(api.route_blocks, arguments)

    def lists(q, k):
        return route(q, k, order, order, Rule(topk=2, topp=0.3))

    expected, actual = lists(q, k), torch.compile(lists, fullgraph=True, backend="eager")(q, k)
    assert all(torch.equal(a, b) for a, b in zip(expected[:2], actual[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_deviations_of_tokens_that_exist(grid, impl, dtype):
    for block, tile in ((8, None), (8, (2, 2, 2)), (64, None), (64, (1, 8, 8)), (1, None)):
        check_deviations(grid, block, tile, dtype, impl)


def test_the_operator_of_deviations_is_whole():
    order = TokenOrder(TokenGrid(3, 5, 7), 8)
    geometry = Geometry.of_visual(order, order).pack()
    torch.library.opcheck(api.block_deviations, (torch.randn(2, 3, 105, 6), geometry, order.visual_blocks, "portable"))


def test_lists_of_a_fixed_number_are_no_wider():
    assert Rule(topk=3).width(9) == 3 and Rule(topk=30).width(9) == 9 and Rule().width(9) == 1
    assert Rule(topk=3, topp=0.1).width(9) == Rule(topk=torch.ones(1, dtype=torch.int32)).width(9) == 9


def test_other_kernels_implementations_count_as_auto():
    grid = TokenGrid(3, 5, 7)
    q, k = torch.randn(2, 1, 1, grid.tokens, 6)
    assert set(NAMES) <= set(impls.names(impls.ROUTER)) and "flex" not in impls.names(impls.ROUTER)
    assert torch.equal(*(blocks(q, k, Rule(topk=3), grid, impl=impl) for impl in ("flex", "auto")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": lambda: Rule(topk=-1)}, "topk -1"),
        ({"rule": lambda: Rule(variance="none")}, "variance 'none'"),
        ({"rule": lambda: Rule(tau=1.0, cells=2)}, "tau cells"),
        ({"rule": lambda: Rule(topk=1, cells=3)}, "3 cells"),
        ({"rule": lambda: Rule(topk=torch.ones(5, dtype=torch.int32))}, "topk"),
        ({"rule": lambda: Rule(forced=torch.ones(3, 3, dtype=torch.bool))}, "forced bool"),
        ({"scale": 0.0}, "scale 0"),
        ({"q": torch.randn(1, 1, 9, 6)}, "q k 9"),
    ],
)
def test_bad_calls_are_refused(change, message):
    grid = TokenGrid(3, 5, 7)
    order, x = TokenOrder(grid, 4), torch.randn(1, 1, grid.tokens, 6)
    with pytest.raises(DitAccelError, match=names(message)):
        route(change.get("q", x), x, order, order, change.get("rule", Rule)(), scale=change.get("scale"))


@pytest.mark.parametrize("impl", ["reference", "portable"])
@pytest.mark.parametrize("rule", ["topk", "topp", "union", "cells", "guard"])
def test_a_block_with_nan_is_listed_in_every_row(rule, impl):
    grid = TokenGrid(3, 5, 7)
    q, k = inputs(grid, torch.float32)
    q[0, 1, 50] = k[0, 1, 50] = torch.nan
    listed = blocks(q, k, RULES[rule](27, 27), grid, impl=impl)
    assert listed[0, 1, :, 50 // 4].all()
