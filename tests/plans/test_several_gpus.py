"""What several GPUs would do, against counts from the token mask."""

import json

import pytest
import torch

import dit_accel
from dit_accel import DitAccelError, TokenGrid
from dit_accel.plans.ranges import even_shares
from dit_accel.plans.several_gpus import forecast

GRID = TokenGrid(5, 6, 7, text=9)
SETTINGS = [
    ("gna", {"window": 3}),
    ("radial", {"decay": 0.2, "sink": False}),
    ("tile", {"references": 1}),
    ("dense", {}),
]


def owners(grid, gpus):
    """The GPU of each token in model order: visual tokens and text are cut each for itself."""
    visual, text = (torch.tensor(even_shares(count, gpus)) for count in (grid.visual, grid.text))
    ranks = torch.arange(gpus)
    return torch.cat([ranks.repeat_interleave(visual), ranks.repeat_interleave(text)])


@pytest.mark.parametrize(("method", "config"), SETTINGS)
@pytest.mark.parametrize(
    ("parallel", "gpus", "degrees"), [("ulysses", 3, (3, 1)), ("ring", 4, (1, 4)), ("unified", 6, (2, 3))]
)
def test_counts_are_those_of_the_token_mask(method, config, parallel, gpus, degrees):
    """Blocks hold one token at this size, so the ranges are exact."""
    heads, dim = 4, 8
    plan = dit_accel.plan(method, grid=GRID, **config)
    several = forecast(plan, gpus, parallel, heads, dim)
    ulysses, ring = degrees
    assert (several.ulysses, several.ring) == degrees
    mask, rank_of = plan.token_mask(), owners(GRID, gpus)
    owner = rank_of // ulysses
    visual = torch.arange(GRID.tokens) < GRID.visual
    transfers, work = 0, iter(several.work)
    for place in range(ring):
        here = owner == place
        # A visual query's pairs are its range's; a text query's are those of the range that holds the key.
        pairs = int(mask[here & visual].sum()) + int(mask[~visual][:, here].sum())
        fetched = sums = 0
        for other in set(range(ring)) - {place}:
            there = owner == other
            read = bool(mask[here & visual][:, there & visual].any())
            transfers += read
            fetched += 2 * read * int((there & visual).sum()) + 3 * int((there & ~visual).sum())
            fetched += int((here & ~visual).sum())
            sums += int((here & ~visual).sum())
        tokens = int(here.sum())
        for index, share in enumerate(even_shares(heads, ulysses)):
            gpu, tokens_here = next(work), int((rank_of == place * ulysses + index).sum())
            assert gpu.pairs == pairs * share
            assert gpu.fetched == (fetched * dim + sums) * share
            assert gpu.exchanged == (3 * tokens_here * (heads - share) + share * (tokens - tokens_here)) * dim
    assert several.fetches == transfers
    assert sum(gpu.pairs for gpu in several.work) == plan.pairs * heads


def test_a_window_reads_its_neighbours_alone():
    """Ranges of two frames; a window of three frames reaches one range on either side, or the three at the border."""
    several = forecast(dit_accel.plan("gna", grid=TokenGrid(16, 4, 4), window=3), 8, "ring", 1, 64)
    assert (several.fetches, several.possible) == (14, 56)
    assert several.balance == 1.0


def test_a_million_tokens_on_64_gpus():
    """No 32-bit count overflows: all pairs are there, in ranges that differ by less than a block."""
    grid = TokenGrid(61, 96, 176, text=226)
    plan = dit_accel.plan("radial", grid=grid, decay=0.2)
    several = forecast(plan, 64, "unified", 40, 128)
    assert (several.ulysses, several.ring) == (8, 8)
    assert sum(gpu.pairs for gpu in several.work) == plan.pairs * 40
    assert 0 < min(gpu.pairs for gpu in several.work)


def test_times_are_work_over_rate():
    """Dense on one GPU: 4 operations a pair and channel; on two, a half, and each sends 2 bytes a value."""
    plan = dit_accel.plan("dense", grid=TokenGrid(1, 8, 8))
    one, two = forecast(plan, 1, "ulysses", 2, 64), forecast(plan, 2, "ulysses", 2, 64)
    assert one.compute_ms(1, 64) == pytest.approx(2 * 64**2 * 4 * 64 / 1e12 * 1e3)
    assert two.compute_ms(1, 64) == pytest.approx(one.compute_ms(1, 64) / 2)
    assert one.traffic_ms(1) == 0
    assert two.traffic_ms(1) == pytest.approx(4 * 32 * 64 * 2 / 1e9 * 1e3)


@pytest.mark.parametrize(
    ("method", "config", "gpus", "heads"),
    [("sol", {}, 2, 4), ("gna", {"window": 3}, 5, 4), ("gna", {"window": 3}, 257, 512)],
)
def test_what_cannot_be_counted_is_refused(method, config, gpus, heads):
    with pytest.raises(DitAccelError):
        forecast(dit_accel.plan(method, grid=GRID, **config), gpus, "ulysses", heads, 64)


RATES = ("--heads", "40", "--tflops", "500", "--link", "400")


def test_the_command_says_it(cli):
    base = ("plan", "--method", "gna:window=3", "--grid", "16x4x4", "--gpus", "8", "--parallel", "ring")
    facts = json.loads(cli(*base, *RATES, "--json").out)
    several = forecast(dit_accel.plan("gna", grid=TokenGrid(16, 4, 4), window=3), 8, "ring", 40, 128)
    assert facts["compute_ms"] == several.compute_ms(500, 128)
    assert facts["traffic_ms"] == several.traffic_ms(400)
    assert (facts["transfers"], facts["transfers_of_dense"]) == (14, 56)
    assert [rank["pairs"] for rank in facts["ranks"]] == [work.pairs for work in several.work]
    assert "14 of 56" in cli(*base, *RATES).out


@pytest.mark.parametrize(
    "options",
    [
        ("--gpus", "2"),
        ("--heads", "40"),
        ("--parallel", "ring"),
        ("--gpus", "2", *RATES, "--gpu", "sm_90"),
        ("--gpus", "0", *RATES),
    ],
)
def test_half_a_prediction_is_refused(cli, options):
    assert cli("plan", "--method", "gna:window=3", "--grid", "4x4x4", *options).status == 2
