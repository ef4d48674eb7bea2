"""CLEAR's disc: every pair by brute force, the published counts, settings for a density, calls on odd grids."""

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.methods.clear import CellWeights, at_density
from dit_accel.plans.sampled import SampledQueries
from dit_accel.tokens import TokenGrid

IN_MODELS = {"radius": 3}


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 9), (1, 9, 5), (3, 4, 7), (2, 1, 13)])
@pytest.mark.parametrize("radius", [1, 2, 3, 5, 40])
def test_the_disc_is_that_of_the_definition(shape, radius):
    plan = dit_accel.plan("clear", TokenGrid(*shape), radius=radius)
    _, y, x = torch.unravel_index(torch.arange(plan.grid.visual), shape)
    disc = (y[:, None] - y).square() + (x[:, None] - x).square() < radius**2
    assert torch.equal(plan.token_mask(), disc)
    assert plan.pairs == disc.sum()


@pytest.mark.parametrize(
    ("side", "radius", "image", "total"),
    [
        (64, 8, 710_052, 5_166_500),
        (64, 16, 2_594_880, 7_051_328),
        (64, 32, 8_085_036, 12_541_484),
        (128, 8, 2_999_204, 20_038_564),
        (128, 16, 11_653_696, 28_693_056),
        (256, 8, 12_320_676, 79_691_684),
    ],
)
def test_published_counts(side, radius, image, total):
    assert dit_accel.plan("clear", TokenGrid(1, side, side), radius=radius).pairs == image
    assert dit_accel.plan("clear", TokenGrid(1, side, side, text=512), radius=radius).pairs == total


def test_the_published_radius_is_the_default():
    assert dit_accel.plan("clear", TokenGrid(1, 64, 64)).config.radius == 16


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_attention_is_softmax_over_the_disc(impl):
    torch.manual_seed(0)
    plan = dit_accel.plan("clear", TokenGrid(1, 9, 14, text=5), radius=4)
    q, k, v = (torch.randn(2, 3, plan.grid.tokens, 24) for _ in range(3))
    mask = plan.token_mask()
    exact, _ = plain_attention(q.double(), k.double(), v.double(), mask, 24**-0.5)
    plain, _ = plain_attention(q, k, v, mask, 24**-0.5)
    assert_accurate("out", dit_accel.attention(q, k, v, plan, impl=impl), plain, exact)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_a_radius_for_a_density(density):
    grid = TokenGrid(1, 33, 47, text=20)
    near = at_density(grid, density)["radius"]

    def error(radius):
        return abs(dit_accel.plan("clear", grid, radius=radius).density - density)

    assert error(near) <= min(error(near + 1), error(max(near - 1, 1)))


def test_a_radius_is_a_whole_number_of_tokens():
    with pytest.raises(DitAccelError, match="radius"):
        dit_accel.plan("clear", TokenGrid(1, 8, 8), radius=0)


def test_pooled_keys_are_in_the_same_softmax_and_their_weights_learn():
    """Against the plan's reference, in fp64; weights start at the mean of a cell."""
    grid, generator = TokenGrid(2, 8, 12, text=5), torch.Generator().manual_seed(0)
    plan, module = dit_accel.plan("clear", grid, radius=3, pool=4), CellWeights(4).double()
    q, k, v = (torch.randn(1, 2, grid.tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    assert torch.equal(plan.attend(q, k, v), plan.attend(q, k, v, module=CellWeights(4)))
    with torch.no_grad():
        module.weight.normal_(generator=generator)
    output = plan.attend(q, k, v, module=module, impl="reference")
    sampled = SampledQueries(plan, torch.arange(grid.tokens), q, k, "reference", module)
    for head in range(2):
        wanted = plan.reference(sampled, head, q[0, head], k[0, head], v[0, head], module.weight)
        torch.testing.assert_close(output[0, head], wanted, rtol=1e-12, atol=1e-12)
    output.sum().backward()
    assert module.weight.grad.abs().min() > 0
    (gradient,) = torch.autograd.grad(wanted.sum(), module.weight)  # of the last head
    alone = plan.attend(q[:, 1:], k[:, 1:], v[:, 1:], module=module, impl="reference").sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(alone, module.weight)[0], rtol=1e-9, atol=1e-9)
    assert plan.pairs == plan.mask.pairs() + grid.dense_pairs + grid.visual * 2 * 2 * 3


def test_pooled_keys_take_whole_cells():
    with pytest.raises(DitAccelError, match=names(4, "1x9x8")):
        dit_accel.plan("clear", TokenGrid(1, 9, 8), pool=4)


def test_cells_are_summed_in_fp32_under_autocast():
    grid, generator = TokenGrid(1, 8, 12), torch.Generator().manual_seed(0)
    plan, module = dit_accel.plan("clear", grid, radius=3, pool=4), CellWeights(4)
    with torch.no_grad():
        module.weight.normal_(generator=generator)
    q, k, v = (torch.randn(1, 2, grid.tokens, 16, generator=generator) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = plan.attend(q, k, v, module=module)
    assert torch.equal(cast, plan.attend(*(x.bfloat16() for x in (q, k, v)), module=module))
