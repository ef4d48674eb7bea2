"""Single tokens besides the exact blocks: which they are, and what attention with them is, by loops in fp64."""

import pytest
import torch

import dit_accel
from dit_accel.kernels.tail.tokens import best_tokens
from dit_accel.plans.plan import attention
from dit_accel.tokens import TokenGrid

GRID = TokenGrid(3, 5, 9, text=11, conditioning=7)


def inputs(grid=GRID, dim=16, batch=2, heads=3, dtype=torch.float32):
    """Strided, as models have them."""
    return [torch.randn(batch, grid.tokens, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(3)]


def visual(x, plan):
    """Visual tokens in the order of the plan's blocks."""
    return plan.arrange(x)[:, :, plan.grid.visual_rows]


def chosen_by_loops(plan, q, k, count):
    """Which visual tokens each query block takes, bool [B, H, query blocks, visual], and which blocks it lists."""
    rows, columns = (order.block_of_visual() for order in (plan.query_order, plan.key_order))
    lists, queries, keys = plan.route(q, k), visual(q, plan).double(), visual(k, plan).double()
    single = torch.zeros(*lists.counts.shape, plan.grid.visual, dtype=torch.bool)
    exact = torch.zeros(*lists.counts.shape, plan.key_order.visual_blocks, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in lists.counts.shape)).tolist():
        b, h, i = place
        exact[b, h, i, lists.indices[b, h, i, : int(lists.counts[b, h, i])].long()] = True
        scores = keys[b, h] @ queries[b, h, rows == i].mean(0)
        scores[exact[b, h, i][columns]] = -torch.inf
        best = scores.sort(descending=True).indices[:count]
        single[b, h, i, best[scores[best] > -torch.inf]] = True
    return single, exact


SETTINGS = [
    ("sol", {"block": 8, "block_q": 8, "tau": 1.5}),
    ("sol", {"block": 8, "tau": 1.5, "order": "tile", "block_q": 16}),
    ("sol", {"block": 8, "block_q": 8, "tau": 1.5, "order": "hilbert", "tail": "none"}),
    ("sparge", {"block": 8, "block_q": 16, "topk": 0.2, "topp": 0.1}),
    ("sparge", {"block": 8, "block_q": 16, "topk": 0.2, "topp": 0.0, "tail": "mean", "order": "morton"}),
]


@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_tokens_are_the_best_outside_the_listed_blocks(method, settings, count):
    plan = dit_accel.plan(method, GRID, **settings)
    q, k, _ = inputs()
    wanted, _ = chosen_by_loops(plan, q, k, count)
    tokens = best_tokens(plan.arrange(q), plan.arrange(k), plan.route(q, k), plan.query_order, plan.key_order, count)
    assert tokens.shape[-1] == min(count, GRID.visual)
    chosen = torch.zeros(*tokens.shape[:3], GRID.visual + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(tokens < 0, GRID.visual, tokens), True)
    assert torch.equal(chosen[..., :-1], wanted)
    assert ((tokens >= 0).sum(-1) == wanted.sum(-1)).all()  # each once


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_attention_with_tokens_is_one_softmax(method, settings):
    """Exact keys, and a pseudo-key of the tokens that are left for every other block, row by row."""
    plan = dit_accel.plan(method, GRID, **settings, extra_tokens=7)
    tensors = inputs(dtype=torch.float64)
    q, k, v = (visual(x, plan) for x in tensors)
    single, exact = chosen_by_loops(plan, *tensors[:2], 7)
    rows, columns = (order.block_of_visual() for order in (plan.query_order, plan.key_order))
    others = torch.ones(GRID.tokens, dtype=torch.bool)
    others[GRID.visual_rows] = False
    out, scale = visual(attention(*tensors, plan), plan), q.shape[-1] ** -0.5
    for b, h, r in ((0, 0, 0), (1, 2, 40), (0, 1, 77), (1, 0, GRID.visual - 1)):
        i = rows[r]
        attended = exact[b, h, i][columns] | single[b, h, i]
        keys = torch.cat([k[b, h, attended], tensors[1][b, h, others]])
        values, weights = torch.cat([v[b, h, attended], tensors[2][b, h, others]]), [torch.ones(len(keys))]
        for j in range(plan.key_order.visual_blocks) if plan.has_tail else ():
            left = int(((columns == j) & ~attended).sum())
            if left and not exact[b, h, i, j]:
                keys = torch.cat([keys, k[b, h, columns == j].mean(0, keepdim=True)])
                values = torch.cat([values, v[b, h, columns == j].mean(0, keepdim=True)])
                weights.append(torch.tensor([float(left)]))
        logits = keys @ q[b, h, r] * scale + torch.cat(weights).double().log()
        torch.testing.assert_close(out[b, h, r], logits.softmax(0) @ values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_all_tokens_are_dense_attention_and_none_change_nothing(method, settings):
    q, k, v = inputs(dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    every = attention(q, k, v, dit_accel.plan(method, GRID, **settings, extra_tokens=GRID.visual))
    torch.testing.assert_close(every, dense, rtol=1e-10, atol=1e-12)
    without, zero = (dit_accel.plan(method, GRID, **settings, **more) for more in ({}, {"extra_tokens": 0}))
    assert torch.equal(attention(q, k, v, without), attention(q, k, v, zero))


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_density_counts_the_tokens(method, settings):
    plan = dit_accel.plan(method, GRID, **settings, extra_tokens=7)
    q, k, v = inputs()
    single, exact = chosen_by_loops(plan, q, k, 7)
    rows, columns = (order.block_of_visual() for order in (plan.query_order, plan.key_order))
    visual_pairs = (single | exact[..., columns])[:, :, rows].double().sum((-2, -1)).mean()
    sums = torch.zeros(2)
    attention_of = plan.attend(q, k, v, density_sum=sums)
    assert attention_of.shape == q.shape and sums[1] == 1
    assert sums[0].item() == pytest.approx((float(visual_pairs) + GRID.dense_pairs) / GRID.tokens**2, rel=1e-5)
    if plan.pairs is not None:
        assert sums[0].item() <= plan.density * (1 + 1e-6)


def test_equal_values_come_out_unchanged_and_nan_is_seen():
    plan = dit_accel.plan("sol", GRID, block=8, block_q=8, tau=2.0, extra_tokens=9)
    q, k, v = inputs(batch=1)
    equal = attention(q, k, torch.full_like(v, 3.0), plan)
    torch.testing.assert_close(equal, torch.full_like(v, 3.0), rtol=1e-5, atol=0)
    k[0, 1, GRID.visual_start + 20, 3] = torch.nan
    out = attention(q, k, v, plan)
    assert bool(out[0, 1].isnan().all()) and bool(out[0, 0].isfinite().all())


def test_gradients_where_single_tokens_weigh_nothing():
    """Logits far apart: the tokens beyond the exact blocks underflow beside the rest of a row."""
    generator = torch.Generator().manual_seed(0)
    plan = dit_accel.plan("sol", GRID, block=8, block_q=8, tau=1.0, extra_tokens=2, tail="hybrid")
    q, k, v = (size * torch.randn(1, 1, GRID.tokens, 16, generator=generator) for size in (12.0, 12.0, 1.0))
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        gradients[dtype] = torch.autograd.grad(attention(*leaves, plan).sum(), leaves)
    for actual, wanted in zip(*gradients.values(), strict=True):
        assert bool(actual.isfinite().all())
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-2, atol=1e-2)


def test_in_one_graph_and_in_a_compiled_call():
    plan = dit_accel.plan("sol", GRID, block=8, block_q=8, tau=2.0, extra_tokens=9)
    q, k, v = inputs()
    wanted = attention(q, k, v, plan)
    compiled = torch.compile(lambda *x: attention(*x, plan), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), wanted)


def test_a_ramp_of_tokens():
    config = dit_accel.Setting.parse("sol:extra_tokens=0..256").config
    assert [config.at(place).extra_tokens for place in (0, 0.5, 1)] == [0, 128, 256]
