"""The errors by which SVG-EAR routes: against their definition, token by token, and what routing by them gains."""

import pytest
import torch
from accuracy import plain_attention
from tail_calls import check_error_calls

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels.tail.errors import tail_errors
from dit_accel.methods.sparge import Config
from dit_accel.tokens import TokenGrid

RAGGED = TokenGrid(3, 5, 7, text=6, conditioning=2)
SETTINGS = {"topk": 0.2, "topp": 0.3, "block_q": 16, "block": 8, "tail": "mean"}


def by_definition(plan, q, k, v, scale):
    """Equation (4) in fp64, without the scaling of rows."""
    q, k, v = (x[:, :, RAGGED.visual_rows].double() for x in (q, k, v))
    rows, columns = (plan.block_of(order) for order in (plan.query_order, plan.key_order))
    errors = torch.zeros(*q.shape[:2], rows.max() + 1, columns.max() + 1, dtype=torch.float64)
    for i in range(errors.shape[2]):
        center = q[:, :, rows == i].mean(2, keepdim=True)
        for j in range(errors.shape[3]):
            keys, values = k[:, :, columns == j], v[:, :, columns == j]
            weights, pooled = ((center * x).sum(-1).mul(scale).exp() for x in (keys, keys.mean(2, keepdim=True)))
            wrong = weights[..., None] * values - pooled[..., None] * values.mean(2, keepdim=True)
            errors[:, :, i, j] = wrong.square().sum((-1, -2)) / (rows == i).sum() / (columns == j).sum()
    return errors


@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_errors_equal_their_definition(order):
    """In fp64 up to one factor a row; a row's listed blocks are its most wrong, as many as with scores of means."""
    q, k, v = torch.randn(3, 2, 3, RAGGED.tokens, 8, dtype=torch.float64)
    plan, by_means = (
        dit_accel.plan("sparge", RAGGED, **SETTINGS, order=order, score=score) for score in ("error", "mean")
    )
    wanted = by_definition(plan, q, k, v, 1.5)
    errors = tail_errors(*(plan.arrange(x) for x in (q, k, v)), plan.query_order, plan.key_order, 1.5)
    shares = [x / x.sum(-1, keepdim=True) for x in (errors, wanted)]
    torch.testing.assert_close(*shares, rtol=1e-11, atol=1e-30)  # of one token: 0, and the square of a rounding
    lists = plan.route(q, k, values=v, scale=1.5)
    assert torch.equal(lists.counts, by_means.route(q, k, scale=1.5).counts)
    best = wanted.argsort(-1, descending=True).argsort(-1) < lists.counts[..., None]
    assert torch.equal(lists.map(lists.used, wanted.shape[-1]), best)


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_calls_against_the_definition(impl):
    """Output and gradients, text and conditioning among them, of ragged tiles."""
    check_error_calls(impl)


@pytest.mark.parametrize(("kind", "order"), [("alike", "raster"), ("field", "tile")])
def test_it_is_nearer_to_dense_than_scores_of_means_at_equal_density(kind, order):
    """Blocks that draw every query but are all alike need no exact attention; a wave's steep parts do."""
    grid = TokenGrid(4, 8, 16)
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 16, dtype=torch.float64)
    if kind == "alike":
        first = torch.randn(16, dtype=torch.float64)
        q, k = q * 0.3 + first, k * 0.3
        k[:, :, :128], v[:, :, :128] = first * 0.25, torch.randn(16, dtype=torch.float64)
    else:
        angle = grid.coordinates().double() @ (torch.randn(3, 8, dtype=torch.float64) * 0.4)
        q = k = 2 * torch.cat([angle.sin(), angle.cos()], -1)[None, None]
    before = [x.clone() for x in (q, k, v)]
    dense = plain_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), 0.25)[0]
    settings = {"topk": 0.25, "topp": 0.0, "block_q": 32, "block": 16, "order": order, "tail": "mean"}
    errors = []
    for score in ("error", "mean"):
        out = dit_accel.attention(q, k, v, dit_accel.plan("sparge", grid, **settings, score=score))
        errors.append((out - dense).norm())
    assert errors[0] < errors[1]
    assert all(torch.equal(*pair) for pair in zip(before, (q, k, v), strict=True))


def test_settings_are_checked():
    for settings, words in (({}, "set tail='mean'"), ({"tail": "mean", "similarity": 0.5}, "Leave out similarity")):
        with pytest.raises(DitAccelError, match=words):
            Config(score="error", **settings)
    plan = dit_accel.plan("sparge", RAGGED, **SETTINGS, score="error")
    with pytest.raises(DitAccelError, match="values=v"):
        plan.route(*torch.randn(2, 1, 1, RAGGED.tokens, 8))
