"""Rectified SpaAttn: selection and gate by loops over the paper's formulas, both compensations, limits, whole calls."""

import math

import pytest
import torch
from messages import names
from roundings import assert_dense, tolerance
from tail_calls import PARTS, check_calls

from dit_accel.errors import DitAccelError
from dit_accel.kernels.tail.rectified import trusted
from dit_accel.methods.rectified import METHOD, Config
from dit_accel.plans.plan import PlanArguments, attention
from dit_accel.plans.sampled import SampledQueries
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

IN_MODELS = {"block": 8, "block_q": 8, "topp": 0.0}
VIDEO = TokenGrid(3, 5, 9)
TEXT = TokenGrid(3, 5, 9, text=11, conditioning=7)
TEXT_FIRST = TokenGrid(3, 5, 9, text=11, text_first=True)
SMALL = {"block": 8, "block_q": 8, "order": "raster"}


def inputs(grid, dim=16, batch=2, heads=2, dtype=torch.float32):
    """q, k and v whose blocks differ more than their tokens, so that some pairs of blocks are trusted."""
    drift = torch.randn(3, batch, heads, grid.tokens // 6 + 1, dim).repeat_interleave(6, -2)[..., : grid.tokens, :]
    return [(x + 0.5 * torch.randn(x.shape)).to(dtype) for x in drift]


def listed(lists, blocks):
    return lists.map(lists.used, blocks)


def tokens_of(chosen):
    """Tokens of every query block and of every key block, in model order."""
    start = chosen.grid.visual_start
    orders = chosen.query_order, chosen.key_order
    return [
        [start + (chosen.block_of(order) == i).nonzero()[:, 0] for i in range(order.visual_blocks)] for order in orders
    ]


def published(q, k, v, chosen, text_lens=None):
    """The paper's formulas for one head in fp64, by loops: kept, trusted, and the visual output [visual, D]."""
    config, grid, scale = chosen.config, chosen.grid, q.shape[-1] ** -0.5
    queries, keys = tokens_of(chosen)
    place = torch.arange(grid.tokens)
    visual = (place >= grid.visual_start) & (place < grid.visual_start + grid.visual)
    other = ~visual
    if text_lens is not None:
        other &= ~((place - grid.text_start >= text_lens) & (place - grid.text_start < grid.text))
    spots = grid.coordinates()
    kept_blocks, trusted_blocks, out = [], [], torch.zeros(grid.tokens, q.shape[-1], dtype=torch.float64)
    for rows in queries:
        query = q[rows].mean(0)
        query_spread = (q[rows] - query).abs().mean(0)
        scores, trust, near = [], [], []
        for columns in keys:
            key = k[columns].mean(0)
            key_spread = (k[columns] - key).abs().mean(0)
            scores.append(float(scale * query @ key))
            trust.append(bool((query @ key).abs() > (query_spread @ key).abs() + (query @ key_spread).abs()))
            here, there = spots[rows - grid.visual_start], spots[columns - grid.visual_start]
            near.append(bool(((here[:, None] - there).abs().amax(-1) <= 1).any()))
        scores = torch.tensor(scores, dtype=torch.float64)
        best = scores.argsort(descending=True).tolist()
        share = scores.softmax(0)
        count = int(config.counts(len(keys)))
        mass = 0.0
        for place_, j in enumerate(best):
            if mass >= config.topp:
                count = max(count, place_)
                break
            mass += float(share[j])
        keep = [j in best[: max(count, 1)] or near[j] for j in range(len(keys))]
        seen = torch.cat([*(keys[j] for j in range(len(keys)) if keep[j]), other.nonzero()[:, 0]])
        sparse = (q[rows] @ k[seen].T * scale).softmax(-1) @ v[seen]
        # isolated pooling: a visual block counts once for each of its tokens, text tokens by themselves
        weights = torch.tensor([len(columns) for columns in keys]) * scores.exp()
        total = weights.sum() + (k[other] @ query * scale).exp().sum()
        rest = [j for j in range(len(keys)) if not keep[j] and (trust[j] or not config.gate)]
        ratio = 1 - sum(float(weights[j] / total) for j in rest)
        out[rows] = ratio * sparse + sum((weights[j] / total * v[keys[j]].mean(0) for j in rest), torch.zeros(()))
        kept_blocks.append(keep)
        trusted_blocks.append(trust)
    return torch.tensor(kept_blocks), torch.tensor(trusted_blocks), out[visual]


SETTINGS = {
    "usual": {"drop": 0.7},
    "by mass": {"drop": 1.0, "topp": 0.6},
    "by number": {"drop": 0.4, "topp": 0.0},
    "wide queries": {"block_q": 16, "topp": 0.2},
    "tiles": {"order": "tile", "drop": 0.6},
    "hilbert": {"order": "hilbert", "drop": 0.7},
    "no gate": {"gate": False, "drop": 0.9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("grid", [TokenGrid(4, 6, 7), TokenGrid(4, 6, 7, text=11, conditioning=3)], ids=str)
def test_published_compensation_is_the_papers(grid, settings):
    chosen = plan("rectified", grid, **{**SMALL, **settings, "compensation": "published"})
    q, k, v = inputs(grid)
    lens = torch.tensor([4, 11]) if grid.text else None
    out = attention(q, k, v, chosen, text_lens=lens)[:, :, : grid.visual]
    limit = tolerance(q, k, v, 2.0)  # rounded: two parts, the ratio and the sum
    blocks = listed(chosen.route(q, k), chosen.key_order.visual_blocks)
    arranged = (chosen.arrange(x) for x in (q, k))
    gate = trusted(*arranged, chosen.query_order, chosen.key_order)
    compensated = 0
    for b in range(2):
        for h in range(2):
            tensors = (x[b, h].double() for x in (q, k, v))
            kept_blocks, safe, expected = published(*tensors, chosen, None if lens is None else int(lens[b]))
            assert torch.equal(blocks[b, h], kept_blocks) and torch.equal(gate[b, h], safe)
            assert (out[b, h].double() - expected).abs().max() <= limit
            compensated += int((safe & ~kept_blocks).sum())
    assert compensated > 0 and not bool(gate.all()), "the gate decides nothing here"


@pytest.mark.parametrize("compensation", ["exact", "published"])
@pytest.mark.parametrize("settings", [{"drop": 0.0}, {"topp": 1.0}], ids=str)
@pytest.mark.parametrize("grid", [VIDEO, TEXT, TEXT_FIRST], ids=str)
def test_everything_kept_is_dense(grid, settings, compensation):
    q, k, v = inputs(grid)
    output = attention(q, k, v, plan("rectified", grid, block=8, block_q=8, compensation=compensation, **settings))
    assert_dense(output, q, k, v)


@pytest.mark.parametrize("compensation", ["exact", "published"])
@pytest.mark.parametrize("gate", [True, False])
def test_equal_values_come_out_unchanged(compensation, gate):
    q, k, v = inputs(TEXT)
    v = v[:, :, :1].expand(v.shape)
    chosen = plan("rectified", TEXT, **SMALL, compensation=compensation, gate=gate)
    out = attention(q, k, v, chosen, text_lens=torch.tensor([11, 3]))
    # the pooled ratio is 1 less a sum of shares, which is rounded once more
    assert_dense(out, q, k, v, PARTS["out"] + (0.5 if compensation == "published" else 0))


def test_without_trust_nothing_is_compensated():
    """Where tokens deviate more than their means say, both compensations are plain block-sparse attention."""
    q, k, v = torch.randn(3, 1, 2, VIDEO.tokens, 16).unbind()
    k = k * torch.tensor([1.0, -1.0]).repeat(VIDEO.tokens)[: VIDEO.tokens, None]
    q = q - q.mean(2, keepdim=True)
    chosen = {name: plan("rectified", VIDEO, **SMALL, compensation=name) for name in ("exact", "published")}
    lists = chosen["exact"].route(q, k)
    some = chosen["exact"]
    gate = trusted(q, k, some.query_order, some.key_order)
    left = ~listed(lists, some.key_order.visual_blocks)
    assert not bool((gate & left).all()) and bool(left.any())
    plain, _ = some.attend_listed(q, k, v, lists, PlanArguments())
    rows = ~(gate & left).any(-1)[:, :, some.block_of(some.query_order)]
    assert bool(rows.any())
    for variant in chosen.values():
        out = attention(q, k, v, variant)
        assert torch.equal(out[rows], plain[rows])


@pytest.mark.parametrize("compensation", ["exact", "published"])
def test_permuted_heads_and_samples_permute_the_output(compensation):
    chosen = plan("rectified", TEXT, block=8, block_q=8, compensation=compensation)
    q, k, v = inputs(TEXT, batch=3, heads=3)
    lens, samples, heads = torch.tensor([11, 3, 0]), torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    out = attention(q, k, v, chosen, text_lens=lens)
    permuted = attention(*(x[samples][:, heads] for x in (q, k, v)), chosen, text_lens=lens[samples])
    assert (permuted - out[samples][:, heads]).abs().max() <= 2 * tolerance(q, k, v, PARTS["out"])  # of two calls


@pytest.mark.parametrize("grid", [TEXT, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("compensation", ["exact", "published"])
def test_text(grid, compensation):
    """Text queries are those of exact attention, bit for bit. Padding text is never read."""
    q, k, v = inputs(grid)
    lens, place = torch.tensor([4, 11]), torch.arange(grid.tokens) - grid.text_start
    hidden = ((place >= lens[:, None]) & (place < grid.text))[:, None, :, None]
    k, v = (x.masked_fill(hidden, torch.nan) for x in (k, v))
    settings = {"block": 8, "block_q": 8, "compensation": compensation}
    out, exact = (
        attention(q, k, v, plan("rectified", grid, drop=drop, **settings), text_lens=lens) for drop in (0.9, 0.0)
    )
    assert bool(out.isfinite().all())
    visual = slice(grid.visual_start, grid.visual_start + grid.visual)
    others = torch.ones(grid.tokens, dtype=torch.bool)
    others[visual] = False
    assert torch.equal(out[:, :, others], exact[:, :, others]) and not torch.equal(out, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compensation", ["exact", "published"])
@pytest.mark.parametrize("case", [(VIDEO, {}), (TEXT, {"order": "hilbert"}), (TEXT_FIRST, {"order": "tile"})], ids=str)
def test_calls_against_the_definition(case, compensation, dtype):
    """Output and gradients by name; the definition in fp64 follows the lists and the gate of the call."""
    grid, settings = case
    chosen = plan("rectified", grid, **{**SMALL, "drop": 0.9, "topp": 0.0, "compensation": compensation, **settings})
    tensors = inputs(grid, batch=1, heads=1, dtype=dtype)
    upstream = torch.randn(1, 1, grid.tokens, 16).to(dtype)
    sampled = SampledQueries(chosen, torch.arange(grid.tokens), *tensors[:2], "portable")

    check_calls(chosen, sampled, tensors, upstream, dtype)


def test_counts_and_density():
    assert [Config(drop=drop).counts(10) for drop in (0.8, 0.75, 0.9, 1.0, 0.0)] == [2, 2, 1, 0, 10]
    assert METHOD.at_density(TokenGrid(8, 32, 32), 0.25) == {"drop": 0.75, "topp": 0.0}


def test_text_that_is_weighed_needs_the_exact_compensation():
    q, k, v = inputs(TEXT, batch=1)
    bias = {"text_lens": torch.tensor([4]), "text_bias": torch.zeros(1, TEXT.tokens)}
    assert bool(plan("rectified", TEXT, **SMALL).attend(q, k, v, **bias).isfinite().all())
    with pytest.raises(DitAccelError, match="compensation='published' takes text"):
        plan("rectified", TEXT, **SMALL, compensation="published").attend(q, k, v, **bias)


REFUSED = (
    ("drop", 1.5), ("block_q", 2000), ("topp", -0.1), ("block", 0),
    ("drop", math.nan), ("compensation", "some"), ("order", "zigzag"), ("gate", 1),
)  # fmt: skip


@pytest.mark.parametrize("name, value", REFUSED)
def test_refusals(name, value):
    with pytest.raises(DitAccelError, match=names(name, value)):
        Config(**{name: value})


def test_blocks_around_by_hand():
    """Blocks of a row of four in 2 x 3 x 4 tokens: a row's neighbours are the rows beside it, in both frames."""
    around = plan("rectified", TokenGrid(2, 3, 4), block=4, block_q=4, order="raster").around(torch.device("cpu"))
    rows = (torch.arange(3)[:, None] - torch.arange(3)).abs() <= 1
    assert torch.equal(around, rows.repeat(2, 2))
