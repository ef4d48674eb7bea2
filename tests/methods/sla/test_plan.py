"""The critical, marginal and negligible blocks of SLA, and what its plan says of them before a call."""

import pytest
import torch
from messages import names
from sla_calls import SHORT, TEXT_FIRST, TEXT_LAST, VIDEO, token_map

from dit_accel.errors import DitAccelError
from dit_accel.methods.sla import Config, SparseLinearAttention
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

IN_MODELS = {"topk": 0.3, "block": 16}


@pytest.mark.parametrize("grid", [VIDEO, TEXT_LAST, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("block_q", [None, 32, 8])
def test_route_partitions_the_visual_blocks(grid, order, block_q):
    settings = {"topk": 0.3, "block": 16, "block_q": block_q, "order": order}
    module = SparseLinearAttention(16, skip=0.25, linear_scope="marginal", **settings)
    q, k = torch.randn(2, 2, 3, grid.tokens, 16)
    routing = module.route(q, k, grid)
    assert (routing.critical.query_order.block, routing.critical.key_order.block) == (block_q or 16, 16)
    rows, visual, blocks = (
        routing.critical.query_order.visual_blocks,
        routing.critical.key_order.visual_blocks,
        routing.critical.query_order.blocks,
    )
    critical, marginal, negligible = (mask.dense().int() for mask in routing)
    assert (critical + marginal + negligible == 1).all()
    assert (critical[..., rows:, :] == 1).all() and (critical[..., visual:] == 1).all()
    inside = [m[..., :rows, :visual].sum(-1) for m in (critical, marginal, negligible)]
    topk, skip = int(0.3 * visual), int(0.25 * visual)
    assert all((m == n).all() for m, n in zip(inside, (topk, visual - topk - skip, skip), strict=True))
    for mask in routing:
        assert mask.kv_counts.shape == (2, 3, blocks) and mask.kv_indices.dtype == torch.int32
        assert not mask.partial.any()

    everything = SparseLinearAttention(16, **settings).route(q, k, grid)
    assert torch.equal(everything.critical.dense(), routing.critical.dense())
    assert everything.negligible.visited == 0
    assert everything.marginal.visited == 6 * rows * (visual - topk)


def test_routing_ignores_text_and_carries_no_gradient():
    """Text may be anything, NaN too, without moving a visual block."""
    module = SparseLinearAttention(16, **SHORT)
    q, k = torch.randn(2, 1, 2, TEXT_FIRST.tokens, 16)
    before = module.route(q, k, TEXT_FIRST).critical
    poisoned = [x.clone() for x in (q, k)]
    for x in poisoned:
        x[:, :, : TEXT_FIRST.text] = torch.nan
    after = module.route(*poisoned, TEXT_FIRST).critical
    assert torch.equal(before.kv_indices, after.kv_indices)


def test_plan_numbers():
    """Wan2.1 at 480p: 32,760 tokens are 512 blocks with a tail of 56, of which 5 % are 25."""
    wan = plan("sla", TokenGrid(21, 30, 52))
    assert (wan.visited, wan.total) == (512 * 25, 512 * 512)
    assert wan.pairs == 32760 * 25 * 64
    text = plan("sla", TokenGrid(2, 8, 8, text=70, conditioning=64), topk=0.5)
    assert (text.visited, text.total) == (2 * (1 + 3) + 3 * 5, 25)
    assert text.pairs == 128 * (64 + 134) + 134 * 262
    assert plan("sla", TokenGrid(1, 5, 5), topk=0.01).visited == 1
    linear = plan("sla", TokenGrid(21, 30, 52), topk=0.0)
    assert (linear.visited, linear.pairs, linear.density) == (0, 0, 0)
    linear = plan("sla", TokenGrid(2, 8, 8, text=70, conditioning=64), topk=0.0)
    assert (linear.visited, linear.pairs) == (2 * 3 + 3 * 5, 128 * 134 + 134 * 262)
    wide = plan("sla", TokenGrid(2, 8, 9, text=70, conditioning=64), topk=0.5, block_q=128)
    assert (wide.visited, wide.total) == (2 * (1 + 3) + 2 * 6, 4 * 6)
    assert wide.pairs == 144 * (64 + 134) + 134 * 278


@pytest.mark.parametrize("block_q", [None, 32])
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_pairs_bound_the_routed_pairs_tightly(order, block_q):
    """Exact where all blocks are whole; where some are not, no call attends more and a call with the largest does."""
    for grid, exact in ((TokenGrid(2, 8, 8, text=5), True), (TokenGrid(3, 5, 9), False)):
        settings = plan("sla", grid, topk=0.3, block=16, block_q=block_q, order=order)
        module = SparseLinearAttention(8, topk=0.3, block=16, block_q=block_q, order=order)
        q, k = torch.randn(2, 1, 8, grid.tokens, 8)
        pairs = token_map(module.route(q, k, grid).critical).sum((-1, -2))
        assert (pairs == settings.pairs).all() if exact else (pairs <= settings.pairs).all()
        assert settings.density == settings.pairs / grid.tokens**2
        # Equal scores keep the first blocks, which are whole here.
        ties = token_map(module.route(torch.ones_like(q), torch.ones_like(k), grid).critical).sum((-1, -2))
        assert (ties == settings.pairs).all()


def test_tiles_are_compact_and_pad_little():
    assert plan("sla", TokenGrid(21, 45, 80), order="tile").key_order.tile == (2, 4, 8)
    assert plan("sla", TokenGrid(16, 32, 32), order="tile").key_order.tile == (4, 4, 4)
    assert plan("sla", TokenGrid(1, 64, 64), order="tile").key_order.tile == (1, 8, 8)


def test_shares_become_blocks():
    config = Config(topk=0.05, skip=0.10, linear_scope="marginal")
    assert [config.counts(n).topk for n in (1, 19, 20, 39, 512)] == [1, 1, 1, 1, 25]
    assert [config.counts(n).skip for n in (1, 9, 10, 512)] == [0, 0, 1, 51]
    assert Config(topk=0.7, skip=0.3, linear_scope="marginal").counts(10).topk == 7
    assert Config(topk=0.0).counts(512) == (0, 0)
    assert Config(topk=1.0).counts(3).topk == 3 and Config().counts(100).skip == 0
    assert Config(topk=0.1, skip=0.9, linear_scope="marginal").counts(1).skip == 0


def test_what_a_plan_cannot_give_is_refused():
    settings = plan("sla", VIDEO)
    for ask in (settings.token_mask, settings.block_mask, settings.image):
        with pytest.raises(DitAccelError, match=names("route(q, k)")):
            ask()
    with pytest.raises(DitAccelError, match=names("SparseLinearAttention", "Linear")):
        settings.attend(*torch.randn(3, 1, 1, VIDEO.tokens, 8), module=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"topk": -0.1}, "topk 0 -0.1"),
        ({"topk": 1.5}, "topk 1.5"),
        ({"skip": -0.1}, "skip -0.1"),
        ({"topk": 0.95, "linear_scope": "marginal"}, "1 0.95 0.1"),
        ({"topk": 0.8, "skip": 0.3}, "1 0.8 0.3"),
        ({"feature_map": "gelu"}, "feature_map softmax elu relu focused hedgehog 'gelu'"),
        ({"linear_scope": "none"}, "linear_scope all marginal 'none'"),
        ({"order": "hilbert"}, "order raster tile 'hilbert'"),
        ({"block": 0}, "block 1 0"),
        ({"block": 1025}, "block 1024 1025"),
        ({"block": 64.0}, "block 64.0"),
        ({"block_q": 0}, "block_q 1 0"),
        ({"block_q": True}, "block_q True"),
        ({"topk": "much"}, "topk 'much'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(DitAccelError, match=names(message)):
        Config(**settings)


@pytest.mark.parametrize("score", ["mean", "learned"])
def test_a_scale_that_would_rank_the_worst_blocks_first_is_refused(score):
    listed = plan("sla", TokenGrid(1, 4, 8), topk=0.5, block=8, score=score)
    q, k, v = torch.randn(3, 1, 1, 32, 16)
    with pytest.raises(DitAccelError, match=names("scale", -0.25)):
        listed.attend(q, k, v, scale=-0.25)
