"""The linear branch over marginal blocks: value, gradients, memory and cancellation."""

import pytest
import torch
from sla_calls import cuts_of, route

from dit_accel.kernels.sla import portable
from dit_accel.kernels.sla.arguments import EPSILON, FEATURE_MAPS, apply_map
from dit_accel.kernels.sla.portable import linear_all, linear_marginal

# grid, block, tile, and those of queries
LAYOUTS = {
    "ragged": ((1, 5, 7), 8),
    "cut tiles": ((2, 3, 5), 8, (1, 2, 4)),
    "one block": ((1, 1, 5), 8),
    "wide queries": ((1, 5, 7), 8, None, 16),
    "narrow queries": ((1, 5, 7), 8, None, 4),
    "wide tiles": ((2, 3, 5), 8, (1, 2, 4), 16, (2, 2, 4)),
}


def make(cuts, topk, skip, dtype=torch.float64, heads=2, dim=5):
    torch.manual_seed(0)
    tokens = cuts.key_order.grid.visual
    q, k, v = (torch.randn(2, heads, tokens, dim, dtype=dtype) for _ in range(3))
    return q, k, v, *route(q, k, cuts, topk, skip)


def by_hand(q, k, v, critical, negligible, cuts, feature_map):
    """One query block at a time, over the tokens of its marginal blocks."""
    out = torch.zeros_like(v)
    rows, slots = (order.index().reshape(-1, order.block) for order in cuts.orders)
    a, b = apply_map(q, feature_map), apply_map(k, feature_map)
    for sample in range(len(q)):
        for head in range(q.shape[1]):
            for row, tokens in enumerate(rows):
                seen = {*critical[sample, head, row].tolist(), *negligible[sample, head, row].tolist()}
                keys = torch.cat([slots[j] for j in range(len(slots)) if j not in seen] or [slots[0][:0]])
                keys, queries = keys[keys >= 0], tokens[tokens >= 0]
                weights = a[sample, head, queries] @ b[sample, head, keys].mT
                out[sample, head, queries] = (weights @ v[sample, head, keys]) / (weights.sum(-1, True) + EPSILON)
    return out


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_marginal_against_sums_by_hand(layout, feature_map):
    cuts = cuts_of(*layout)
    blocks = cuts.key_order.blocks
    for topk, skip in ((1, 0), (1, min(1, blocks - 1)), (blocks, 0)):
        q, k, v, *lists = make(cuts, topk, skip)
        out, _ = linear_marginal(q, k, v, *lists, cuts.pack(), feature_map)
        torch.testing.assert_close(out, by_hand(q, k, v, *lists, cuts, feature_map), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_marginal_gradients(layout, feature_map):
    cuts = cuts_of(*layout)
    q, k, v, *lists = make(cuts, 1, min(1, cuts.key_order.blocks - 1), heads=1, dim=3)

    def branch(q, k, v):
        return linear_marginal(q, k, v, *lists, cuts.pack(), feature_map)[0]

    assert torch.autograd.gradcheck(branch, [x.requires_grad_() for x in (q, k, v)], fast_mode=True)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_all_gradients(feature_map):
    q, k, v, *_ = make(cuts_of((1, 1, 9), 8), 1, 0, heads=1, dim=3)
    inputs = [x.requires_grad_() for x in (q, k, v, torch.randn(3, 3, dtype=torch.float64))]

    def branch(q, k, v, weight):
        return linear_all(q, k, v, feature_map, weight)

    assert torch.autograd.gradcheck(branch, inputs, fast_mode=True)


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_is_registered_properly(tile, dtype):
    cuts = cuts_of((1, 5, 6), 8, tile)
    q, k, v, *lists = make(cuts, 1, 1, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(linear_marginal, (q, k, v, *lists, cuts.pack(), "softmax"))


def test_no_marginal_block_gives_zero():
    cuts = cuts_of((1, 1, 32), 8)
    q, k, v, *lists = make(cuts, 3, 1)
    out, _ = linear_marginal(q, k, v, *lists, cuts.pack(), "relu")
    assert (out == 0).all()


def test_huge_critical_keys_do_not_cancel():
    """Totals minus critical contributions would lose the marginal sums behind 1e8 times larger ones; a sum does not."""
    cuts = cuts_of((1, 1, 64), 8)
    q, k, v, *_ = make(cuts, 1, 0, dtype=torch.float32)
    q, k = q.abs(), k.abs()
    k[:, :, :8] *= 1e8
    critical, negligible = route(q, k, cuts, 1, 0)
    assert (critical == 0).all()
    out, _ = linear_marginal(q, k, v, critical, negligible, cuts.pack(), "relu")
    exact = by_hand(q.double(), k.double(), v.double(), critical, negligible, cuts, "relu")
    assert (out - exact).abs().max() < 64 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("tile", [None, (1, 2, 4)])
def test_small_budget_gives_the_same(monkeypatch, tile):
    """Heads and columns a few at a time: same values and gradients, to the last bits of the changed sums."""
    cuts = cuts_of((1, 5, 7), 8, tile)
    q, k, v, *lists = make(cuts, 1, 1)
    gradient = torch.randn_like(v)

    def run():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = linear_marginal(*inputs, *lists, cuts.pack(), "elu")
        return out, *torch.autograd.grad(out, inputs, gradient)

    whole = run()
    monkeypatch.setattr(portable, "_STATE_BYTES", 1)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_saves_no_states_for_the_backward():
    """What autograd holds grows with N x D: not with N x N, and not with a D x D state per block."""
    tokens, dim = 4096, 64
    cuts = cuts_of((1, 1, tokens), 16)
    q, k, v = (torch.randn(1, 1, tokens, dim, requires_grad=True) for _ in range(3))
    lists = route(q.detach(), k.detach(), cuts, 12, 25)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        linear_marginal(q, k, v, *lists, cuts.pack(), "softmax")
    assert max(saved) <= tokens * dim
