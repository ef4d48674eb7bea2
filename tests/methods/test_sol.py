"""Sol-Attn: its threshold against the paper's formulas, its limits, what its tail keeps, whole calls against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from messages import names
from roundings import assert_dense, tolerance
from tail_calls import PARTS, block_of, check_calls

from dit_accel.errors import DitAccelError
from dit_accel.methods.sol import METHOD, Config, SolPlan
from dit_accel.plans.plan import attention
from dit_accel.plans.sampled import SampledQueries
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

IN_MODELS = {"block": 8, "block_q": 8, "tail": "hybrid"}
VIDEO = TokenGrid(3, 5, 9)
TEXT = TokenGrid(3, 5, 9, text=11, conditioning=7)
TEXT_FIRST = TokenGrid(3, 5, 9, text=11, text_first=True)


def inputs(grid, dim=16, batch=2, heads=2, dtype=torch.float32):
    return [torch.randn(batch, grid.tokens, heads, dim).transpose(1, 2).to(dtype) for _ in range(3)]


def smooth(grid, dim=32, heads=2):
    """q, k and v that change slowly over the grid, as fields of a few waves."""
    t, h, w = grid.coordinates().double().T
    fields = []
    for _ in range(3):
        waves = [torch.randn(3, dim * heads, dtype=torch.float64) for _ in range(4)]
        phases = sum(
            (
                wave[0] * t[:, None] / grid.frames
                + wave[1] * h[:, None] / grid.height
                + wave[2] * w[:, None] / grid.width
            ).sin()
            for wave in waves
        )
        fields.append(phases.view(-1, heads, dim).transpose(0, 1)[None].float())
    return fields


def listed(lists, blocks):
    blocks_listed = torch.zeros(*lists.counts.shape, blocks, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in lists.counts.shape)):
        row = tuple(place.tolist())
        blocks_listed[row][lists.indices[row][: int(lists.counts[row])].long()] = True
    return blocks_listed


def formula(q, k, settings):
    """The blocks that the paper's rule lists, by loops in fp64: bool [B, H, queries, keys]."""
    config = settings.config
    rows, columns = (block_of(order) for order in (settings.query_order, settings.key_order))
    start = settings.grid.visual_start
    scale = q.shape[-1] ** -0.5
    visual = slice(start, start + settings.grid.visual)
    means = []
    for x, blocks in ((q, rows), (k, columns)):
        means.append(
            torch.stack([x[:, :, visual][:, :, blocks == i].double().mean(2) for i in range(int(blocks.max()) + 1)], 2)
        )
    queries, keys = means
    chosen = torch.zeros(*q.shape[:2], queries.shape[2], keys.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:3])).tolist():
        query, key = queries[b, h, i], keys[b, h]
        scores = scale * key @ query
        if config.variance == "exact":
            variance = scores.var(unbiased=False)
        else:
            variance = scale**2 * (query.square() * key.var(0, unbiased=False)).sum()
        # the published code adds 1e-6 in units of log2
        spread = math.sqrt(max(float(variance), 0.0) / math.log(2) ** 2 + 1e-6) * math.log(2)
        chosen[b, h, i] = scores > scores.mean() + config.tau * spread
        around = columns[rows == i].unique()
        near = torch.cat([around - 1, around, around + 1])
        chosen[b, h, i, near[(near >= 0) & (near < len(key))]] = True
        chosen[b, h, i, columns[: config.sink]] = True
    return chosen


@pytest.mark.parametrize("variance", ["diagonal", "exact"])
@pytest.mark.parametrize("settings", [
    {}, {"tau": 0.3, "sink": 20}, {"order": "tile"}, {"block_q": 32, "tau": 0.5}, {"block_q": 32, "order": "tile"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("grid", [VIDEO, TEXT, TEXT_FIRST], ids=str)
def test_lists_are_the_papers(grid, settings, variance):
    chosen = plan("sol", grid, **{"block": 8, "block_q": 8, "variance": variance, **settings})
    q, k, _ = inputs(grid)
    blocks = listed(chosen.route(q, k), chosen.key_order.visual_blocks)
    assert torch.equal(blocks, formula(q, k, chosen))
    assert 0.1 < blocks.float().mean() < 0.95


def test_neighbours_and_sinks_by_hand():
    forced = plan("sol", TokenGrid(1, 1, 40), block=8, block_q=8).forced(torch.device("cpu"))
    neighbours = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    assert torch.equal(forced, neighbours)
    sink = plan("sol", TokenGrid(1, 1, 40), block=8, block_q=8, sink=9).forced(torch.device("cpu"))
    assert torch.equal(sink, neighbours | (torch.arange(5) < 2))
    wide = plan("sol", TokenGrid(1, 1, 64), block=8, block_q=16).forced(torch.device("cpu"))
    assert wide.int().tolist()[1] == [0, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("tau", "density"), [(1.0, 0.1587), (1.3, 0.0968), (1.5, 0.0668), (2.0, 0.0228)])
@pytest.mark.parametrize("variance", ["diagonal", "exact"])
def test_density_of_normal_scores(tau, density, variance):
    """Blocks of one token with normal queries and keys: a share of 1 - Phi(tau) is exact, besides the neighbours."""
    grid = TokenGrid(1, 1, 2048)
    chosen = plan("sol", grid, tau=tau, block=1, block_q=1, variance=variance)
    q, k, _ = inputs(grid, dim=64, batch=1, heads=1)
    share = listed(chosen.route(q, k), 2048)[~chosen.forced(torch.device("cpu"))[None, None]].float().mean()
    assert abs(float(share) - density) < 0.005


def test_variances_agree_where_coordinates_are_uncorrelated():
    blocks, block, dim = 32, 4, 8
    grid = TokenGrid(1, 1, blocks * block)
    basis = torch.linalg.qr(torch.cat([torch.ones(blocks, 1), torch.randn(blocks, dim)], 1).double())[0][:, 1:]
    keys = (basis * torch.rand(dim) * 20).repeat_interleave(block, 0).float()[None, None]
    q = torch.randn(1, 1, grid.tokens, dim)
    settings = {"block": block, "block_q": block, "tau": 0.8}
    lists = [
        listed(plan("sol", grid, variance=kind, **settings).route(q, keys), blocks) for kind in ("diagonal", "exact")
    ]
    assert torch.equal(*lists)
    mixed = keys @ (torch.eye(dim) + torch.ones(dim, dim))
    lists = [
        listed(plan("sol", grid, variance=kind, **settings).route(q, mixed), blocks) for kind in ("diagonal", "exact")
    ]
    assert not torch.equal(*lists)


@pytest.mark.parametrize("order", ["raster", "tile", "morton", "hilbert"])
@pytest.mark.parametrize("tail", ["mean", "hybrid", "none"])
@pytest.mark.parametrize("grid", [VIDEO, TEXT, TEXT_FIRST], ids=str)
def test_everything_exact_is_dense(grid, tail, order):
    q, k, v = inputs(grid)
    output = attention(q, k, v, plan("sol", grid, tau=-1e6, block=8, block_q=8, tail=tail, order=order))
    assert_dense(output, q, k, v)


def test_the_tail_is_nearer_to_dense_than_dropping():
    grid = TokenGrid(4, 16, 16)
    q, k, v = smooth(grid)
    dense = F.scaled_dot_product_attention(q, k, v)
    plans = {tail: plan("sol", grid, block=16, block_q=16, tail=tail) for tail in ("mean", "none")}
    assert all(torch.equal(a, b) for a, b in zip(*(plan.route(q, k)[:2] for plan in plans.values()), strict=True))
    error = {tail: float((attention(q, k, v, plan) - dense).norm() / dense.norm()) for tail, plan in plans.items()}
    assert error["mean"] < 0.5 * error["none"]


@pytest.mark.parametrize("tail", ["mean", "hybrid"])
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_equal_values_come_out_unchanged(order, tail):
    """A row's weights add up to one, with ragged blocks and text."""
    q, k, v = inputs(TEXT)
    v = v[:, :, :1].expand(v.shape)
    out = attention(
        q, k, v, plan("sol", TEXT, block=8, block_q=8, tail=tail, order=order), text_lens=torch.tensor([11, 3])
    )
    # PISA's term is a sum of differences from means times v, which cancel up to the rounding of their magnitudes
    differences = 2 * float((q.abs() @ k.abs().mT).mean(-1).max()) * 16**-0.5 if tail == "hybrid" else 0.0
    assert_dense(out, q, k, v, PARTS["out"] + differences)


@pytest.mark.parametrize("tail", ["mean", "hybrid"])
def test_permuted_heads_and_samples_permute_the_output(tail):
    chosen = plan("sol", TEXT, block=8, block_q=8, tail=tail)
    q, k, v = inputs(TEXT, batch=3, heads=3)
    lens = torch.tensor([11, 3, 0])
    samples, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    out = attention(q, k, v, chosen, text_lens=lens)
    permuted = attention(*(x[samples][:, heads] for x in (q, k, v)), chosen, text_lens=lens[samples])
    assert (permuted - out[samples][:, heads]).abs().max() <= 2 * tolerance(q, k, v, PARTS["out"])  # of two calls


@pytest.mark.parametrize("grid", [TEXT, TEXT_FIRST], ids=str)
def test_text(grid):
    """Text queries are those of exact attention, bit for bit. Padding text is never read."""
    q, k, v = inputs(grid)
    lens, place = torch.tensor([4, 11]), torch.arange(grid.tokens) - grid.text_start
    hidden = ((place >= lens[:, None]) & (place < grid.text))[:, None, :, None]
    k, v = (x.masked_fill(hidden, torch.nan) for x in (k, v))
    out, exact = (
        attention(q, k, v, plan("sol", grid, tau=tau, block=8, block_q=8), text_lens=lens) for tau in (1.0, -1e6)
    )
    assert bool(out.isfinite().all())
    visual = slice(grid.visual_start, grid.visual_start + grid.visual)
    others = torch.ones(grid.tokens, dtype=torch.bool)
    others[visual] = False
    assert torch.equal(out[:, :, others], exact[:, :, others]) and not torch.equal(out, exact)


CALLS = {
    "mean": (VIDEO, {}),
    "hybrid": (TEXT, {"tail": "hybrid"}),
    "none": (TEXT_FIRST, {"tail": "none"}),
    "tile": (TEXT_FIRST, {"order": "tile", "block_q": 16}),
    "morton": (TEXT, {"order": "morton", "sink": 9}),
    "hilbert hybrid": (VIDEO, {"order": "hilbert", "tail": "hybrid", "block_q": 16}),
    "tokens": (TEXT, {"extra_tokens": 9, "tau": 2.0}),
    "tokens, no tail": (TEXT_FIRST, {"extra_tokens": 9, "tau": 2.0, "tail": "none"}),
    "tokens, hybrid": (TEXT, {"extra_tokens": 7, "tau": 2.0, "tail": "hybrid", "order": "tile", "block_q": 16}),
    "tokens, morton": (VIDEO, {"extra_tokens": 7, "tau": 2.0, "order": "morton", "block_q": 16}),
    "all tokens": (TEXT, {"extra_tokens": 200, "tau": 2.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CALLS)
def test_calls_against_the_definition(case, dtype):
    """Output and gradients by name; the definition in fp64 follows the lists of the call."""
    grid, settings = CALLS[case]
    chosen = plan("sol", grid, **{"block": 8, "block_q": 8, **settings})
    tensors, upstream = inputs(grid, batch=1, heads=1, dtype=dtype), torch.randn(1, 1, grid.tokens, 16).to(dtype)
    sampled = SampledQueries(chosen, torch.arange(grid.tokens), *tensors[:2], "portable")

    check_calls(chosen, sampled, tensors, upstream, dtype)


def test_density_asked_for():
    grid = TokenGrid(8, 32, 32)
    q, k, _ = inputs(grid, dim=64)
    for density in (0.4, 0.2, 0.1):
        chosen = SolPlan(Config(**METHOD.at_density(grid, density)), grid)
        assert abs(float(listed(chosen.route(q, k), 128).float().mean()) - density) < 0.03
    assert METHOD.at_density(grid, 1.0)["tau"] < -5 < 5 < METHOD.at_density(grid, 1e-6)["tau"]


REFUSED = (
    ("tau", "high"), ("tau", math.nan), ("tail", "far"), ("variance", "full"),
    ("order", "zigzag"), ("sink", -1), ("block", 0), ("block_q", 2000),
)  # fmt: skip


@pytest.mark.parametrize("name, value", REFUSED)
def test_refusals(name, value):
    with pytest.raises(DitAccelError, match=names(name, value)):
        Config(**{name: value})
