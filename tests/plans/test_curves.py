"""Curves through a grid: permutations whose neighbours are near."""

import itertools
import time

import pytest
import torch

from dit_accel.plans.curves import along

SHAPES = [*itertools.product((1, 2, 3, 5), (1, 4, 7), (1, 2, 6, 9)), (21, 30, 52), (1, 64, 64), (13, 1, 1)]


def places(curve, shape):
    """Frame, row and column along a curve: int64 [visual, 3]."""
    return torch.stack(torch.unravel_index(along(curve, shape), shape), 1)


@pytest.mark.parametrize("curve", ["morton", "hilbert"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_curve_is_a_permutation(curve, shape):
    count = shape[0] * shape[1] * shape[2]
    assert torch.equal(along(curve, shape).sort().values, torch.arange(count))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hilbert_takes_one_step_at_a_time(shape):
    """To a neighbour, or diagonally where an axis is odd; never back by more."""
    steps = places("hilbert", shape).diff(dim=0).abs()
    assert (steps <= 1).all() and (steps.sum(1) <= 2).all()
    if all(n % 2 == 0 or n == 1 for n in shape):
        assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize("shape", [(8, 16, 16), (5, 14, 22), (21, 30, 52)])
def test_blocks_along_a_curve_are_compact(shape):
    """Spread of 64 tokens about their mean place, against runs in raster order."""

    def spread(x):
        blocks = x[: len(x) // 64 * 64].unflatten(0, (-1, 64)).double()
        return blocks.var(1, correction=0).sum(-1).mean()

    raster = spread(torch.stack(torch.unravel_index(torch.arange(shape[0] * shape[1] * shape[2]), shape), 1))
    assert spread(places("hilbert", shape)) < raster / 3
    assert spread(places("morton", shape)) < raster / 2


def test_morton_interleaves_bits():
    assert along("morton", (2, 2, 2)).tolist() == list(range(8))
    assert along("morton", (1, 4, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.timing
def test_a_long_video_takes_a_second():
    started = time.process_time()
    along.__wrapped__("hilbert", (31, 90, 160))
    assert time.process_time() - started < 1
