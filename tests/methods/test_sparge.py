"""sparge: the plan against masked attention on independently chosen blocks, and what must hold of every setting."""

import math

import pytest
import torch
from accuracy import plain_attention
from messages import names
from roundings import assert_dense, assert_masked
from tail_calls import PARTS

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.sparge import Config, SpargePlan
from dit_accel.tokens import TokenGrid

IN_MODELS = {"topk": 0.3, "topp": 0.1, "block_q": 16, "block": 16}
VIDEO = TokenGrid(3, 5, 7)
TEXT = TokenGrid(3, 5, 7, text=9, conditioning=4)
TEXT_FIRST = TokenGrid(2, 6, 9, text=11, text_first=True)
SMALL = {"block_q": 16, "block": 8}
SETTINGS = {
    "union": {"topk": 0.2, "topp": 0.3},
    "mass": {"topk": 0, "topp": 0.7, "similarity": 0.1},
    "number": {"topk": 0.5, "topp": 0.0, "similarity": -0.1},
    "subblock": {"topk": 0.25, "topp": 0.2, "score": "subblock", "cells": 2},
    "tile": {"topk": 0.2, "order": "tile"},
    "morton": {"topk": 0.2, "order": "morton", "block_q": 8},
    "hilbert": {"topk": 0.1, "topp": 0.5, "order": "hilbert", "score": "subblock", "block": 16},
}


def inputs(grid, batch=2, heads=3, dim=24):
    return [torch.randn(batch, grid.tokens, heads, dim).transpose(1, 2) for _ in range(4)]


def chosen(plan, q, k):
    """The kept pairs of visual tokens from the definition, block by block in fp64: bool [B, H, visual, visual]."""
    config, grid = plan.config, plan.grid
    start = grid.visual_start
    q, k = (x[:, :, start : start + grid.visual].double() for x in (q, k))
    rows, columns = (plan.block_of(order) for order in (plan.query_order, plan.key_order))
    if plan.curve is None:
        walk = torch.arange(grid.visual)
    else:
        walk = plan._rows_on(torch.device("cpu"))[0][start : start + grid.visual] - start
    parts = config.cells if config.score == "subblock" else 1

    def cells(x, block_of, order):
        """Means of the cells of every block: [B, H, blocks, cells, D], NaN where a cell has no token."""
        index = order.index()[: order.visual_blocks * order.block].view(-1, order.block) - start
        means = []
        for block in range(order.visual_blocks):
            slots = index[block].view(parts, -1)
            tokens = [part[part >= 0] for part in slots]
            assert (block_of[torch.cat([walk[part] for part in tokens])] == block).all()
            means.append(torch.stack([x[:, :, walk[part]].mean(2) for part in tokens], 2))
        return torch.stack(means, 2)

    pairs = torch.einsum("bhiad,bhjcd->bhijac", cells(q, rows, plan.query_order), cells(k, columns, plan.key_order))
    scores = (pairs * q.shape[-1] ** -0.5).exp().nan_to_num(0).sum((-1, -2)).log()
    selected = torch.zeros_like(scores, dtype=torch.bool)
    if config.similarity is not None:
        same = []
        for x, block_of in ((q, rows), (k, columns)):
            unit = x / x.norm(dim=-1, keepdim=True)
            gram = unit @ unit.mT
            same.append(
                torch.stack(
                    [gram[:, :, block_of == i][..., block_of == i].mean((-1, -2)) for i in range(block_of.max() + 1)],
                    -1,
                )
                > config.similarity
            )
        selected |= ~same[0][..., None] | ~same[1][:, :, None]
        scores = scores.masked_fill(~same[1][:, :, None], -math.inf)
    order = scores.argsort(-1, descending=True)
    share = scores.softmax(-1).gather(-1, order)
    ranked = (share.cumsum(-1) - share) < config.topp
    ranked[..., : int(config.topk * scores.shape[-1])] = True
    ranked[..., 0] = True
    selected |= torch.zeros_like(selected).scatter(-1, order, ranked)
    return selected[:, :, rows][..., columns]


def whole_mask(plan, q, k, text_lens=None):
    """The mask of the whole sequence, text and conditioning dense: bool [B, H, N, N]."""
    grid = plan.grid
    where = slice(grid.visual_start, grid.visual_start + grid.visual)
    mask = torch.ones(*q.shape[:2], grid.tokens, grid.tokens, dtype=torch.bool)
    mask[:, :, where, where] = chosen(plan, q, k)
    if text_lens is not None:
        position = torch.arange(grid.tokens) - grid.text_start
        mask &= ~((position >= text_lens[:, None]) & (position < grid.text))[:, None, None]
    return mask


@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize("grid", [VIDEO, TEXT, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_forward_and_gradients_equal_masked_attention(config, grid, impl):
    *tensors, gradient = inputs(grid)
    lens = torch.tensor([3, grid.text]) if grid.text else None
    plan = dit_accel.plan("sparge", grid, **{**SMALL, **config})
    mask = whole_mask(plan, *tensors[:2], lens)

    def attend(q, k, v):
        if lens is not None:  # what no query may read
            position = torch.arange(grid.tokens) - grid.text_start
            padding = ((position >= lens[:, None]) & (position < grid.text))[:, None, :, None]
            k, v = (x.masked_fill(padding, torch.nan) for x in (k, v))
        return dit_accel.attention(q, k, v, plan, text_lens=lens, impl=impl)

    assert_masked(attend, tensors, gradient, mask)


@pytest.mark.parametrize("config", [{"topk": 1.0}, {"topp": 1.0}, {"topk": 0.01, "similarity": 1.0}], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "morton", "hilbert"])
def test_keeping_all_blocks_is_dense(config, order):
    q, k, v, _ = inputs(TEXT_FIRST)
    plan = dit_accel.plan("sparge", TEXT_FIRST, **{**SMALL, **config}, order=order)
    assert_dense(dit_accel.attention(q, k, v, plan), q, k, v)


def test_a_little_less_than_all_leaves_out_one_block():
    """Which has the lowest score; with one cell a block, both scores are one."""
    q, k, *_ = inputs(VIDEO)
    plans = [
        dit_accel.plan("sparge", VIDEO, **SMALL, topk=0.999, topp=0.0, score=score, cells=1)
        for score in ("mean", "subblock")
    ]
    lists = [plan.route(q, k) for plan in plans]
    assert (lists[0].counts == plans[0].key_order.visual_blocks - 1).all()
    assert torch.equal(lists[0].indices, lists[1].indices)
    by_mass = dit_accel.plan("sparge", VIDEO, **SMALL, topk=0.0, topp=0.5).route(q, k)
    assert len(by_mass.counts.unique()) > 1, "counts differ from row to row"


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_rows_of_text_are_exact_to_the_bit(order):
    """They do not depend on what visual rows leave out."""
    q, k, v, _ = inputs(TEXT)
    few, all_ = (
        dit_accel.attention(q, k, v, dit_accel.plan("sparge", TEXT, **SMALL, topk=topk, topp=0.0, order=order))
        for topk in (0.1, 1.0)
    )
    assert torch.equal(few[:, :, TEXT.visual :], all_[:, :, TEXT.visual :])
    assert not torch.equal(few[:, :, : TEXT.visual], all_[:, :, : TEXT.visual])


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_permuted_heads_and_samples_have_permuted_outputs(config):
    q, k, v, _ = inputs(TEXT)
    plan = dit_accel.plan("sparge", TEXT, **{**SMALL, **config})
    turned = dit_accel.attention(*(x.flip(0)[:, [2, 0, 1]] for x in (q, k, v)), plan)
    assert torch.equal(turned, dit_accel.attention(q, k, v, plan).flip(0)[:, [2, 0, 1]])


def test_settings_of_spargeattn_keep_all_of_unlike_tokens():
    """By mass and by number; the guard of the second is one that hardly any block meets."""
    grid = TokenGrid(4, 8, 16)
    smooth = 4 * torch.randn(1, 2, 8, 16).repeat_interleave(64, 2) + 0.1 * torch.randn(1, 2, 512, 16)
    rough = torch.randn(1, 2, 512, 16)
    for config in ({"topk": 0.0, "topp": 0.98, "similarity": 0.6}, {"topk": 0.5, "topp": 0.0, "similarity": -0.1}):
        plan = dit_accel.plan("sparge", grid, **config, block_q=64)
        shares = [plan.route(x, x).counts.double().mean() / 8 for x in (smooth, rough)]
        assert shares[1] == (1.0 if config["similarity"] > 0 else 0.5)
        assert shares[0] < 0.7


def test_pairs_are_known_where_a_number_is_kept():
    grid = TokenGrid(4, 8, 16, text=10)
    plan = dit_accel.plan("sparge", grid, topk=0.5, topp=0.0)
    q, k, *_ = inputs(grid)
    measured = torch.zeros(2)
    plan.add_density(plan.route(q, k), measured)
    assert measured[0].item() == pytest.approx(plan.density) and plan.pairs == 512 * 256 + grid.dense_pairs
    assert dit_accel.plan("sparge", grid).pairs is None
    assert dit_accel.plan("sparge", grid, topk=0.001, topp=0).pairs == 512 * 64 + grid.dense_pairs


@pytest.mark.parametrize("grid", [VIDEO, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_a_tail_conserves_the_mass(config, grid):
    """Equal values come out as they are, with ragged blocks and text."""
    q, k, _, _ = inputs(grid)
    v = torch.randn(1, 3, 1, 24).expand(2, -1, grid.tokens, -1)
    out = dit_accel.attention(q, k, v, dit_accel.plan("sparge", grid, **{**SMALL, **config}, tail="mean"))
    assert_dense(out, q, k, v, PARTS["out"])


def test_a_tail_is_nearer_to_dense_than_none_on_a_smooth_field():
    grid = TokenGrid(4, 8, 16)
    angle = grid.coordinates().double() @ (torch.randn(3, 12, dtype=torch.float64) * 0.2)
    x = torch.cat([angle.sin(), angle.cos()], -1)[None, None]
    dense = plain_attention(x, x, x, torch.ones(1, 1, dtype=torch.bool), 24**-0.5)[0]
    plans = {
        tail: dit_accel.plan("sparge", grid, topk=0.3, topp=0.0, block_q=64, tail=tail) for tail in ("mean", "none")
    }
    errors = {tail: (dit_accel.attention(x, x, x, plan) - dense).norm().item() for tail, plan in plans.items()}
    assert errors["mean"] < errors["none"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 1.5}, "topk 1 1.5"),
        ({"topp": -0.1}, "topp 0 -0.1"),
        ({"topk": 0, "topp": 0.0}, "topk topp 0"),
        ({"tail": "some"}, "tail"),
        ({"refresh": 0}, "refresh 1"),
        ({"score": "max"}, "score subblock"),
        ({"order": "zigzag"}, "order raster tile morton hilbert"),
        ({"similarity": 2.0}, "similarity 1"),
        ({"block": 0}, "block 1"),
        ({"block_q": 4096}, "block_q 1024"),
        ({"cells": 0}, "cells 1"),
        ({"score": "subblock", "cells": 3}, "block_q cells=3"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(DitAccelError, match=names(message)):
        Config(**settings)


def test_at_density_keeps_that_share():
    from dit_accel.registry import get_method

    grid = TokenGrid(8, 32, 32)
    plan = SpargePlan(Config(**get_method("sparge").at_density(grid, 0.25)), grid)
    assert plan.density == pytest.approx(0.25)


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS.values(), {"topk": 0.1, "topp": 0.0, "score": "error", "tail": "mean"}],
    ids=[*SETTINGS, "error"],
)
@pytest.mark.parametrize("grid", [VIDEO, TEXT], ids=str)
def test_nan_in_one_token_is_nan_in_all_of_its_sample_and_head(grid, settings):
    q, k, v, _ = inputs(grid)
    for x in (q, k, v):
        x[1, 2, grid.visual_start + 40] = torch.nan
    out = SpargePlan(Config(**{**SMALL, **settings}), grid).attend(q, k, v)
    lost = out.isnan().all(-1)
    assert lost[1, 2].all(), "as with dense attention"
    lost[1, 2] = False
    assert not lost.any()
