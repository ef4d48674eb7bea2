"""Plans: public figures, block masks in any tile, planning time, and `attention` against masked softmax."""

import math

import pytest
import torch
from layouts import check_layouts
from messages import names
from method_settings import in_models
from yardstick import within

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.plans.tiles import choose_tiles, tile_shapes
from dit_accel.tokens import TokenGrid

STATIC = [
    ("gna", {"window": (18, 24, 24), "stride": (16, 8, 8)}),
    ("gna", {"window": 0.5}),
    ("tile", {"references": 3}),
    ("radial", {"decay": 0.2}),
    ("radial", {"decay": 0.95, "rule": "released"}),
]
IDS = [f"{method}-{len(config)}-{index}" for index, (method, config) in enumerate(STATIC)]


@pytest.mark.parametrize(("method", "config"), STATIC, ids=IDS)
def test_density_is_of_the_token_mask(method, config):
    if config.get("window") == (18, 24, 24):
        config = {"window": (4, 3, 4), "stride": (2, 3, 2)}
    grid = TokenGrid(5, 6, 7, text=11, text_first=method == "gna")
    plan = dit_accel.plan(method, grid, **config)
    mask = plan.token_mask()
    assert mask.shape == (grid.tokens, grid.tokens)
    assert plan.pairs == int(mask.sum())
    assert plan.density == plan.pairs / grid.tokens**2
    assert 0 < plan.density < 1


@pytest.mark.timing
@pytest.mark.parametrize(("method", "config"), STATIC, ids=IDS)
def test_planning_120_000_tokens_takes_under_50_ms(method, config):
    """In process time, so that what else the machine does counts little."""
    grid = TokenGrid(31, 48, 81, text=256)

    def planned():
        plan = dit_accel.plan(method, grid, **config)
        assert plan.pairs > 0
        plan.block_mask()

    assert within(0.05, planned)


def test_a_method_with_settings_as_one_types_them():
    grid = TokenGrid(4, 8, 8)
    typed = dit_accel.plan("gna:window=2x4x4,stride=1", grid, stride=(2, 4, 4))
    assert typed.config == dit_accel.plan("gna", grid, window=(2, 4, 4), stride=(2, 4, 4)).config
    with pytest.raises(DitAccelError, match="tau"):
        dit_accel.plan("gna:tau=1", grid)


def test_the_plan_has_the_last_word_on_order():
    plan = dit_accel.plan("gna", TokenGrid(4, 8, 8), window=(2, 4, 4), stride=(2, 4, 4))
    chosen = plan.block_mask(block_q=32, block_k=32)
    assert chosen.query_order.tile == (2, 4, 4)
    assert chosen.visited == chosen.full == 8
    assert plan.block_mask(32, 32, order="raster").query_order.tile is None
    assert plan.block_mask(tile_q=(1, 4, 8), tile_k=(1, 4, 4)).key_order.block == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tile_q": (1, 4, 4)}, "tile_q tile_k"),
        ({"order": "hilbert"}, "raster tile"),
        ({"order": "raster", "tile_q": (1, 4, 4), "tile_k": (1, 4, 4)}, "order='tile'"),
        ({"block_q": 0}, "block=0"),
        ({"block_k": -4, "order": "tile"}, "token"),
        ({"tile_q": (1, 0, 4), "tile_k": (1, 4, 4)}, "token"),
        ({"block_q": 8, "tile_q": (1, 4, 4), "tile_k": (1, 4, 4)}, "product"),
    ],
)
def test_contradictions_are_refused(arguments, words):
    plan = dit_accel.plan("gna", TokenGrid(4, 8, 8), window=2)
    with pytest.raises(DitAccelError, match=names(words)):
        plan.block_mask(**arguments)


def test_the_planner_finds_the_fewest_blocks():
    grid = TokenGrid(6, 10, 13)
    plan = dit_accel.plan("gna", grid, window=(3, 5, 4), stride=(1, 2, 2))
    best = plan.block_mask(16, 8, order="tile")
    for tile_q in tile_shapes(16, grid.shape):
        for tile_k in tile_shapes(8, grid.shape):
            assert best.visited <= plan.block_mask(tile_q=tile_q, tile_k=tile_k).visited
    assert choose_tiles(plan.mask, grid, 16, 8) == (best.query_order.tile, best.key_order.tile)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 3, 200), (300, 1, 1), (2, 2, 2)])
def test_tile_shapes_do_not_reach_past_the_grid_for_nothing(shape):
    shapes = tile_shapes(64, shape)
    assert shapes
    assert all(math.prod(tile) == 64 for tile in shapes)
    assert all(size < 2 * length for tile in shapes for size, length in zip(tile[:2], shape[:2], strict=True))


def test_token_masks_stop_at_20_000_tokens():
    with pytest.raises(DitAccelError, match=names("20,000")):
        dit_accel.plan("radial", TokenGrid(21, 30, 52)).token_mask()


def test_a_picture_too_large_to_look_at_is_refused():
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(16, 256, 257), window=1)
    with pytest.raises(dit_accel.DitAccelError, match=names("256,000 1,052,672")):
        plan.image()


def test_the_picture_shows_every_block():
    plan = dit_accel.plan("tile", TokenGrid(8, 16, 16, text=40), references=2)
    picture = plan.image()
    mask = plan.block_mask()
    assert picture.width % mask.key_order.blocks == 0
    assert picture.height % mask.query_order.blocks == 0
    assert len(picture.getcolors()) >= 2


@pytest.mark.parametrize("impl", ["auto", "reference", "portable"])
@pytest.mark.parametrize(("method", "config"), [*STATIC[1:], ("dense", {}), ("gna", {"window": (2, 3, 3)})])
def test_attention_is_masked_softmax(method, config, impl):
    """In fp64, where the exact result and ours may differ by rounding alone."""
    torch.manual_seed(0)
    grid = TokenGrid(5, 4, 7, text=9, text_first=config.get("window") == (2, 3, 3))
    plan = dit_accel.plan(method, grid, **config)
    q, k, v = (torch.randn(2, 3, grid.tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = plan.token_mask().expand(2, 1, -1, -1).clone()
    text_lens = torch.tensor([4, 9])
    for sample, length in enumerate(text_lens.tolist()):
        mask[sample, :, :, grid.text_start + length : grid.text_start + grid.text] = False
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    output = dit_accel.attention(q, k, v, plan, text_lens=text_lens, impl=impl)
    assert output.shape == q.shape
    assert output.transpose(1, 2).is_contiguous()
    seed = torch.randn_like(expected)
    for name, result, exact in zip(
        ("output", "dq", "dk", "dv"),
        (output, *torch.autograd.grad(output, (q, k, v), seed)),
        (expected, *torch.autograd.grad(expected, (q, k, v), seed)),
        strict=True,
    ):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


ROUTED_AND_STATIC = {m: s for m, s in in_models().items() if m not in ("agent", "heads", "moh", "proxy", "scaledit")}

SHAPES = {
    "tokens": [(2, 2, 16, 8), (2, 2, 15, 8), (2, 2, 16, 8)],
    "grouped heads": [(2, 2, 16, 8), (2, 1, 16, 8), (2, 1, 16, 8)],
    "samples": [(2, 2, 16, 8), (1, 2, 16, 8), (1, 2, 16, 8)],
    "head_dim": [(2, 2, 16, 8), (2, 2, 16, 4), (2, 2, 16, 8)],
    "values": [(2, 2, 16, 8), (2, 2, 16, 8), (2, 2, 16, 4)],
    "no samples": [(0, 2, 16, 8)] * 3,
    "no heads": [(2, 0, 16, 8)] * 3,
    "no channels": [(2, 2, 16, 0)] * 3,
    "no heads' axis": [(2, 16, 8)] * 3,
}


@pytest.mark.parametrize("method", ["dense", "gna", "heads", "rectified"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_attention_refuses_other_shapes_alike_in_all_methods(shapes, method):
    config = {"gna": {"window": 2}, "heads": {"keep": (1, 0)}, "rectified": {"block": 16, "block_q": 16}}
    plan = dit_accel.plan(method, TokenGrid(1, 4, 4), **config.get(method, {}))
    with pytest.raises(DitAccelError, match=names("q k v batch heads 16 head_dim")):
        dit_accel.attention(*map(torch.zeros, shapes), plan)


@pytest.mark.parametrize("method", sorted(ROUTED_AND_STATIC))
def test_the_strides_do_not_matter(method):
    grid = TokenGrid(3, 4, 6, text=3, text_first=True)
    check_layouts(dit_accel.plan(method, grid, **ROUTED_AND_STATIC[method]), "portable")


@pytest.mark.parametrize("method", ["dense", "gna"])
def test_attention_refuses_other_kinds_alike_in_all_methods(method):
    plan = dit_accel.plan(method, TokenGrid(1, 4, 4), **({"window": 2} if method == "gna" else {}))
    q = torch.zeros(1, 1, 16, 8)
    for other in (q.half(), q.double(), q.int()):
        with pytest.raises(DitAccelError, match=names("dtype", str(other.dtype))):
            dit_accel.attention(q, other, q, plan)
    with pytest.raises(DitAccelError, match=names("int32")):
        dit_accel.attention(q.int(), q.int(), q.int(), plan)
    with pytest.raises(DitAccelError, match=names("device meta")):
        dit_accel.attention(q, q.to("meta"), q, plan)
    with pytest.raises(DitAccelError, match=names("ndarray")):
        dit_accel.attention(q.numpy(), q, q, plan)
    with pytest.raises(DitAccelError, match=names("'gna'")):
        dit_accel.attention(q, q, q, "gna")
    with torch.autocast("cpu", torch.bfloat16):
        assert dit_accel.attention(q, q.bfloat16(), q, plan).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "config"), [("gna", {"window": (2, 3, 4)}), ("radial", {"rule": "released", "block": 16})]
)
def test_the_callers_default_device_and_inference_mode_do_not_matter(method, config):
    grid = dit_accel.TokenGrid(3, 5, 7, text=9)
    wanted = dit_accel.plan(method, grid, **config).lists(torch.device("cpu"))
    with torch.device("meta"), torch.inference_mode():
        plan = dit_accel.plan(method, grid, **config)
        assert plan.prepare(torch.device("cpu"), torch.float32, 8)[0] == "portable"
        lists = plan.lists(torch.device("cpu"))
    assert torch.equal(lists.indices, wanted.indices) and not lists.indices.is_inference()


@pytest.mark.parametrize(("method", "config"), [*STATIC[1:], ("dense", {}), ("sla", {"block": 16, "topk": 0.3})])
def test_figures_and_masks_do_not_depend_on_the_callers_default_device(method, config):
    """A meta tensor among those on the CPU is an error, as one on a GPU is."""

    def look():
        plan = dit_accel.plan(method, TokenGrid(5, 4, 7, text=9), **config)
        figures = [plan.pairs, plan.density]
        if method == "sla":
            return figures
        return [*figures, plan.block_mask().visited, plan.image().tobytes(), plan.token_mask().tolist()]

    wanted = look()
    with torch.device("meta"), torch.inference_mode():
        assert look() == wanted


@pytest.mark.parametrize("lens", [torch.tensor([3.0]), torch.tensor([True]), [3]])
def test_text_lens_are_integers(lens):
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(1, 3, 4, text=5), window=1)
    q = torch.zeros(1, 1, 17, 8)
    with pytest.raises(dit_accel.DitAccelError, match=names("text_lens")):
        dit_accel.attention(q, q, q, plan, text_lens=lens)


@pytest.mark.parametrize(("method", "config"), [("gna", {"window": 3}), ("sla", {"block": 16})])
def test_who_computes_is_refused_as_the_call_is(method, config):
    plan = dit_accel.plan(method, TokenGrid(5, 4, 7), **config)
    with pytest.raises(DitAccelError, match=names("impl='triton' float64")):
        plan.prepare(torch.device("cpu"), torch.float64, 64, "triton")
