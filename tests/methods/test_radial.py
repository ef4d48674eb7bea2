"""Radial attention: the paper's equation token by token, and the released code's block masks number for number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.radial import released_radius
from dit_accel.plans.masks import Band
from dit_accel.tokens import TokenGrid

IN_MODELS = {"decay": 0.2}
WAN768, WAN22, HUNYUAN, HUNYUAN720 = (18, 48, 80), (20, 48, 80), (30, 48, 80), (33, 45, 80)
HUNYUAN_LONG, WAN720, WAN480 = (64, 45, 80), (21, 45, 80), (21, 30, 52)


def sees(query, key, frame_tokens, decay, sink):
    """The paper's equation 4 for one pair of tokens."""
    (t, p), (s, r) = divmod(query, frame_tokens), divmod(key, frame_tokens)
    if sink and s == 0:
        return True
    band = int(math.log2(max(abs(t - s), 1)))
    if band == 0:
        return True
    width = decay * frame_tokens / 2**band
    if width >= 1:
        return abs(p - r) + 1 <= width
    return p == r and abs(t - s) % math.ceil(1 / width) == 0


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([0.2, 0.5, 0.8, 1.0, 3.0]),
    st.booleans(),
)
def test_the_papers_equation(frames, height, width, decay, sink):
    grid = TokenGrid(frames, height, width)
    plan = dit_accel.plan("radial", grid, decay=decay, sink=sink)
    n = height * width
    expected = [[sees(q, k, n, decay, sink) for k in range(grid.visual)] for q in range(grid.visual)]
    assert torch.equal(plan.token_mask(), torch.tensor(expected))
    assert plan.pairs == sum(map(sum, expected))


PUBLISHED = [  # grid, decay, sink, block, blocks kept, token pairs before rounding
    (WAN768, 0.2, True, 128, 83728, 1_284_617_328),
    (WAN768, 1.0, True, 128, 125656, 1_951_133_184),
    (WAN22, 0.8, True, 64, 502720, 2_044_533_904),
    (WAN22, 0.8, True, 128, 126912, 2_047_632_688),
    (HUNYUAN, 0.95, False, 128, 222452, 3_440_847_216),
    (HUNYUAN, 0.95, True, 128, 243688, None),
    (HUNYUAN_LONG, 1.0, False, 128, 575360, None),
    (HUNYUAN_LONG, 1.0, True, 128, 621078, None),
    (HUNYUAN720, 0.95, False, 128, 232685, 3_575_290_608),
    (WAN720, 0.2, True, 64, 327286, 1_304_881_600),
    (WAN720, 0.2, True, 128, 91264, 1_402_412_592),
    (WAN720, 1.0, True, 64, 540653, 2_182_793_232),
    (WAN720, 1.0, True, 128, 138028, 2_182_793_232),
    (WAN480, 0.2, True, 64, 69998, 271_942_488),
    (WAN480, 0.2, True, 128, 22023, 329_615_208),
    (WAN480, 1.0, True, 64, 110941, 437_354_280),
    (WAN480, 1.0, True, 128, 28931, 440_164_200),
]


@pytest.mark.parametrize(("shape", "decay", "sink", "block", "listed", "pairs"), PUBLISHED)
def test_the_released_codes_blocks(shape, decay, sink, block, listed, pairs):
    grid = TokenGrid(*shape)
    plan = dit_accel.plan("radial", grid, rule="released", decay=decay, sink=sink, block=block)
    side, rest = divmod(grid.visual, block)
    mask = plan.block_mask()
    assert int(mask.dense()[:side, :side].sum()) == listed
    assert mask.query_order.blocks == side + (rest > 0)
    assert mask.visited == listed + (2 * side + 1 if rest else 0)
    assert mask.full == mask.visited
    if pairs is not None:
        radius = released_radius(grid.frames, grid.height * grid.width, decay, sink, block)
        assert Band(radius, grid.height, grid.width).pairs() == pairs


def test_official_fractions():
    assert len(PUBLISHED) > 0
    for shape, settings_, fraction in (
        (WAN768, {"decay": 0.2}, 83728 / 291600),
        (HUNYUAN, {"decay": 0.95, "sink": False}, 222452 / 810000),
    ):
        plan = dit_accel.plan("radial", TokenGrid(*shape), rule="released", **settings_)
        assert plan.block_mask().density == fraction
        assert plan.density == fraction


def test_the_rest_of_the_tokens_is_dense():
    grid = TokenGrid(3, 7, 9, text=5)
    plan = dit_accel.plan("radial", grid, rule="released", block=16, decay=0.1, sink=False)
    mask = plan.token_mask()
    tail = slice(grid.visual // 16 * 16, grid.visual)
    assert mask[tail].all()
    assert mask[:, tail].all()
    assert mask[:, grid.visual :].all()
    assert plan.pairs == int(mask.sum())
    assert plan.density < 1


def test_a_block_plan_has_one_block_mask():
    plan = dit_accel.plan("radial", TokenGrid(3, 7, 9), rule="released", block=16)
    assert plan.block_mask(16, 16, order="raster") is plan.block_mask()
    for arguments in ({"block_q": 32}, {"order": "tile"}, {"tile_q": (1, 4, 4), "tile_k": (1, 4, 4)}):
        with pytest.raises(DitAccelError, match=names("16 x 16")):
            plan.block_mask(**arguments)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"decay": 0}, "decay 0"),
        ({"decay": "wide"}, "decay"),
        ({"sink": 1}, "sink 1"),
        ({"block": 0}, "block 0"),
        ({"rule": "papr"}, "rule paper released"),
    ],
)
def test_bad_settings_are_refused(settings_, words):
    with pytest.raises(DitAccelError, match=names(words)):
        dit_accel.plan("radial", TokenGrid(2, 2, 2), **settings_)


def test_decays_at_the_ends_of_the_numbers():
    """All frames whole, or none but the neighbours', where width or period are no finite numbers."""
    grid, near = TokenGrid(9, 5, 7), (torch.arange(9)[:, None] - torch.arange(9)).abs() <= 1
    for rule in ("paper", "released"):
        dit_accel.plan("radial", grid, rule=rule, decay=1e308)
    assert dit_accel.plan("radial", grid, decay=1e308, sink=False).pairs == grid.tokens**2
    for decay in (1e-310, 5e-324):
        assert dit_accel.plan("radial", grid, decay=decay, sink=False).pairs == int(near.sum()) * 35**2
