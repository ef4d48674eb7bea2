"""The linear branch over marginal blocks: value, gradients, memory and cancellation."""

import pytest
import torch

from dit_accel.kernels.sla import portable
from dit_accel.kernels.sla.call import EPSILON, FEATURE_MAPS, Cut, apply_map
from dit_accel.kernels.sla.portable import linear_all, linear_marginal, route

LAYOUTS = {"ragged": ((1, 5, 7), 8, None), "cut tiles": ((2, 3, 5), 8, (1, 2, 4)), "one block": ((1, 1, 5), 8, None)}


def make(grid, block, tile, topk, skip, dtype=torch.float64, heads=2, dim=5):
    torch.manual_seed(0)
    tokens = Cut(grid, block, tile).order.grid.visual
    q, k, v = (torch.randn(2, heads, tokens, dim, dtype=dtype) for _ in range(3))
    return q, k, v, *route(q, k, Cut(grid, block, tile).pack(), topk, skip)


def by_hand(q, k, v, critical, negligible, order, feature_map):
    """One query block at a time, over the tokens of its marginal blocks."""
    out = torch.zeros_like(v)
    slots = order.index().reshape(order.visual_blocks, order.block)
    a, b = apply_map(q, feature_map), apply_map(k, feature_map)
    for sample in range(len(q)):
        for head in range(q.shape[1]):
            for row, tokens in enumerate(slots):
                seen = {*critical[sample, head, row].tolist(), *negligible[sample, head, row].tolist()}
                keys = torch.cat([slots[j] for j in range(len(slots)) if j not in seen] or [slots[0][:0]])
                keys, queries = keys[keys >= 0], tokens[tokens >= 0]
                weights = a[sample, head, queries] @ b[sample, head, keys].mT
                out[sample, head, queries] = (weights @ v[sample, head, keys]) / (weights.sum(-1, True) + EPSILON)
    return out


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("grid, block, tile", LAYOUTS.values(), ids=LAYOUTS)
def test_marginal_against_sums_by_hand(grid, block, tile, feature_map):
    order = Cut(grid, block, tile).order
    for topk, skip in ((1, 0), (1, min(1, order.visual_blocks - 1)), (order.visual_blocks, 0)):
        q, k, v, *lists = make(grid, block, tile, topk, skip)
        out, _ = linear_marginal(q, k, v, *lists, Cut(grid, block, tile).pack(), feature_map)
        torch.testing.assert_close(out, by_hand(q, k, v, *lists, order, feature_map), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("grid, block, tile", LAYOUTS.values(), ids=LAYOUTS)
def test_marginal_gradients(grid, block, tile, feature_map):
    blocks = Cut(grid, block, tile).order.visual_blocks
    q, k, v, *lists = make(grid, block, tile, 1, min(1, blocks - 1), heads=1, dim=3)

    def branch(q, k, v):
        return linear_marginal(q, k, v, *lists, Cut(grid, block, tile).pack(), feature_map)[0]

    assert torch.autograd.gradcheck(branch, [x.requires_grad_() for x in (q, k, v)], fast_mode=True)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_all_gradients(feature_map):
    q, k, v, *_ = make((1, 1, 9), 8, None, 1, 0, heads=1, dim=3)
    inputs = [x.requires_grad_() for x in (q, k, v, torch.randn(3, 3, dtype=torch.float64))]

    def branch(q, k, v, weight):
        return linear_all(q, k, v, feature_map, weight)

    assert torch.autograd.gradcheck(branch, inputs, fast_mode=True)


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_is_registered_properly(tile, dtype):
    grid = (1, 5, 6)
    q, k, v, *lists = make(grid, 8, tile, 1, 1, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(linear_marginal, (q, k, v, *lists, Cut(grid, 8, tile).pack(), "softmax"))


def test_no_marginal_block_gives_zero():
    q, k, v, *lists = make((1, 1, 32), 8, None, 3, 1)
    out, _ = linear_marginal(q, k, v, *lists, Cut((1, 1, 32), 8, None).pack(), "relu")
    assert (out == 0).all()


def test_huge_critical_keys_do_not_cancel():
    """Totals minus critical contributions would lose the marginal sums behind 1e8 times larger ones; a sum does not."""
    q, k, v, *_ = make((1, 1, 64), 8, None, 1, 0, dtype=torch.float32)
    q, k = q.abs(), k.abs()
    k[:, :, :8] *= 1e8
    critical, negligible = route(q, k, Cut((1, 1, 64), 8, None).pack(), 1, 0)
    assert (critical == 0).all()
    order = Cut((1, 1, 64), 8, None).order
    out, _ = linear_marginal(q, k, v, critical, negligible, Cut((1, 1, 64), 8, None).pack(), "relu")
    exact = by_hand(q.double(), k.double(), v.double(), critical, negligible, order, "relu")
    assert (out - exact).abs().max() < 64 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
def test_small_budget_gives_the_same(monkeypatch, tile):
    """Heads and columns a few at a time: same values and gradients, to the last bits of the changed sums."""
    grid = (1, 5, 7)
    q, k, v, *lists = make(grid, 8, tile, 1, 1)
    gradient = torch.randn_like(v)

    def run():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = linear_marginal(*inputs, *lists, Cut(grid, 8, tile).pack(), "elu")
        return out, *torch.autograd.grad(out, inputs, gradient)

    whole = run()
    monkeypatch.setattr(portable, "_STATE_BYTES", 1)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_saves_no_states_for_the_backward():
    """What autograd holds grows with N x D: not with N x N, and not with a D x D state per block."""
    tokens, dim = 4096, 64
    cut = Cut((1, 1, tokens), 16).pack()
    q, k, v = (torch.randn(1, 1, tokens, dim, requires_grad=True) for _ in range(3))
    lists = route(q.detach(), k.detach(), cut, 12, 25)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        linear_marginal(q, k, v, *lists, cut, "softmax")
    assert max(saved) <= tokens * dim
