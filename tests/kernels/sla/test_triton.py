"""The Triton kernels of SLA, on a GPU or under Triton's interpreter; for whole calls see tests/methods/sla.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this file runs in a process of its own.
"""

import importlib.util
import os

import pytest
import torch
from accuracy import assert_accurate
from messages import names
from sla_calls import cuts_of, route, sparse_linear_attention

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.cuts import block_means
from dit_accel.kernels.router.api import classify, single_blocks
from dit_accel.kernels.router.triton_configs import MAX_COUNTED
from dit_accel.kernels.sla import ops, triton_configs
from dit_accel.kernels.sla.portable import linear_all, linear_marginal
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if NATIVE else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if NATIVE else [])]
NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias")
# topk, skip, and what `cuts_of` takes
LAYOUTS = {
    "one token": (1, 0, (1, 1, 1), 16),
    "one token over": (1, 1, (1, 1, 17), 16),
    "ragged": (2, 3, (3, 5, 7), 16),
    "cut tiles": (3, 2, (3, 3, 5), 16, (2, 2, 4)),
    "everything": (3, 0, (1, 4, 9), 16),
    "wide queries": (2, 3, (3, 5, 7), 16, None, 64),
    "narrow queries": (1, 1, (3, 5, 7), 64, None, 16),
    "wide tiles": (3, 2, (3, 3, 5), 16, (2, 2, 4), 32, (2, 4, 4)),
}


def inputs(kind, tokens, dtype, heads=2, dim=24):
    """q and k of which many scores are equal, or none."""
    torch.manual_seed(0)
    shape = 1, tokens, heads, dim
    if kind == "random":
        tensors = torch.randn(2, *shape)
    elif kind == "equal":
        tensors = torch.ones(2, *shape)
    else:
        tensors = torch.randint(-1, 2, (2, *shape)) * torch.tensor([1.0, -0.0]).repeat(dim // 2)
    return [x.transpose(1, 2).to(dtype).to(DEVICE) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "few values"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_are_those_of_the_portable_router(layout, kind, dtype):
    topk, skip, *cut = LAYOUTS[layout]
    if dtype != torch.float32 and INTERPRETED and layout != "ragged":
        pytest.skip("half precision is interpreted on one layout: the sums are fp32 all the same")
    cuts = cuts_of(*cut)
    arguments = *inputs(kind, cuts.key_order.grid.visual, dtype), cuts, topk, skip
    for got, wanted in zip(route(*arguments, "triton"), route(*arguments), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, wanted)


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 32, 33, 256, 257, 512, 513, 1182, 2049, MAX_COUNTED])
def test_selection_at_the_bounds_of_its_widths(blocks):
    """The lists of a few rows, from scores that fp32 holds exactly; in every third row they are equal."""
    generator = torch.Generator().manual_seed(blocks)
    queries, keys = (torch.randint(-200, 201, (1, 1, n, 3), generator=generator).float() for n in (4, blocks))
    queries[:, :, ::3] = 0
    queries, keys = queries.to(DEVICE), keys.to(DEVICE)
    topk, skip = max(1, blocks // 20), blocks // 10
    orders = single_blocks(queries), single_blocks(keys)
    lists = [classify(queries, keys, *orders, topk, skip, impl) for impl in ("triton", "portable")]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*lists, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lists_stay_within_bounds_for_bad_values(bad):
    q, _ = inputs("random", 64, torch.float32)
    q[0, 0, 5] = bad
    q[0, 1] = bad
    critical, negligible = route(q, q, cuts_of((1, 1, 64), 16), 2, 1, "triton")
    lists = torch.cat([critical, negligible], dim=-1)
    assert lists.min() >= 0 and lists.max() < 4
    assert all(len(set(row)) == 3 for row in lists.flatten(0, 2).tolist())


def test_text_around_the_visual_tokens_is_not_read():
    order = TokenOrder(TokenGrid(1, 5, 9, text=7, text_first=True, conditioning=4), 16)
    q, k = inputs("random", order.grid.tokens, torch.float32)
    wanted = classify(q, k, order, order, 1, 1, "portable")
    for x in (q, k):
        x[:, :, :7] = torch.nan
        x[:, :, 7 + 45 :] = torch.nan
    for got, expected in zip(classify(q, k, order, order, 1, 1, "triton"), wanted, strict=True):
        assert torch.equal(got, expected)


def attend(q, k, v, critical, negligible, weight, bias, cuts, feature_map, scope):
    """`ops.attend` of visual tokens alone, with the state that it wants."""
    state, total, _ = ops.state(k.detach(), v.detach(), cuts, Geometry.unpack(cuts).key_order.blocks, feature_map)
    text_len = critical.new_zeros(len(q))
    training = any(x.requires_grad for x in (q, k, v, weight))
    return ops.attend(
        q, k, v, state, total, critical, negligible, weight, bias, text_len, cuts, 0.25, feature_map,
        scope, training, "triton",
    )  # fmt: skip


def branch(q, k, v, weight, bias, feature_map):
    """The linear branch of scope "all" alone: no block is critical."""
    cuts = cuts_of((1, 1, k.shape[2]), 16)
    none = torch.empty(*q.shape[:2], cuts.query_order.blocks, 0, dtype=torch.int32, device=q.device)
    return attend(q, k, v, none, none, weight, bias, cuts.pack(), feature_map, "all")[0]


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_linear_branch_over_several_splits(monkeypatch, feature_map):
    """Splits of 64 tokens, the last one ragged: value and all gradients against fp64."""
    monkeypatch.setattr(triton_configs, "SPLIT", 64)
    torch.manual_seed(0)
    leaves = [torch.randn(1, 150, 1, 20).transpose(1, 2) for _ in range(3)] + [torch.randn(20, 20), torch.randn(20)]
    gradient = torch.randn_like(leaves[0])

    def results(function, dtype, device):
        tensors = [x.detach().to(dtype).to(device).requires_grad_() for x in leaves]
        out = function(*tensors)
        gradients = torch.autograd.grad(out, tensors, gradient.to(out))
        return [x.detach().cpu() for x in (out, *gradients)]

    def plain(q, k, v, weight, bias):
        return linear_all(q, k, v, feature_map, weight) + bias

    got = results(lambda *x: branch(*x, feature_map), torch.float32, DEVICE)
    exact = results(plain, torch.float64, "cpu")
    for name, *values in zip(NAMES, got, results(plain, torch.float32, "cpu"), exact, strict=True):
        # both sums have as many terms, in another order: one rounding more for the splits
        assert_accurate(name, *values, magnitude=2 * values[-1].abs())


def test_ten_runs_are_bit_equal():
    q, k = inputs("random", 70, torch.float32, heads=2 if NATIVE else 1)
    arguments = {"topk": 1, "block": 16, "weight": torch.randn(24, 24, device=DEVICE), "impl": "triton"}
    leaves = [x.requires_grad_() for x in (q, k, k.clone().detach())]
    first = None
    for _ in range(10 if NATIVE else 2):
        out = sparse_linear_attention(*leaves, **arguments)
        results = out, *torch.autograd.grad(out.square().sum(), leaves)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    assert out.transpose(1, 2).is_contiguous()


def test_ops_are_registered_properly():
    _, k = inputs("random", 20, torch.float32, heads=1, dim=16)
    torch.library.opcheck(ops.state, (k, k, cuts_of((1, 4, 5), 16).pack(), 2, "elu"))


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_the_fused_op_is_registered_properly(scope):
    q, k, v, critical, negligible, cuts, feature_map = marginal_call(heads=1, tokens=35)
    state, total, _ = ops.state(k, v, cuts, Geometry.unpack(cuts).key_order.blocks, feature_map)
    weight, bias = (torch.randn(size, device=DEVICE) for size in ((24, 24), (24,)))
    leaves = (x.requires_grad_() for x in (q, k, v))
    projection = (x.requires_grad_() for x in (weight, bias))
    lengths = critical.new_zeros(1), cuts, 0.25
    tensors = *leaves, state, total, critical, negligible, *projection
    torch.library.opcheck(ops.attend, (*tensors, *lengths, feature_map, scope, True, "triton"))
    with torch.no_grad():
        out, *saved = ops.attend(*tensors, *lengths, feature_map, scope, False, "triton")
    assert torch.equal(out, ops.attend(*tensors, *lengths, feature_map, scope, True, "triton")[0])
    assert not any(x.numel() for x in saved)
    with pytest.raises(DitAccelError, match="without training=True"):
        ops.attend(*tensors, *lengths, feature_map, scope, False, "triton")


def test_compiles_whole():
    q, k = inputs("random", 40, torch.float32, heads=1, dim=16)
    weight = torch.randn(16, 16, device=DEVICE)

    def attend(q, k):
        return sparse_linear_attention(q, k, k, topk=1, block=16, weight=weight, impl="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), attend(q, k))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block": 24}, "blocks 16 32 64 128 24"),
        ({"dim": 160}, "head dimensions 128 160"),
        ({"dtype": torch.float64}, "float64"),
        ({"block": 128, "linear_scope": "marginal"}, "queries keys 128 64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(settings, message):
    settings = {"block": 16, "dim": 16, "dtype": torch.float32} | settings
    dim, dtype = settings.pop("dim"), settings.pop("dtype")
    q = torch.zeros(1, 1, 48, dim, dtype=dtype, device=DEVICE)
    weight = torch.zeros(dim, dim, device=DEVICE)
    with pytest.raises(DitAccelError, match=names(message)):
        sparse_linear_attention(q, q, q, topk=1, weight=weight, impl="triton", **settings)


@pytest.mark.skipif(NATIVE, reason="bfloat16 is native")
def test_the_interpreter_refuses_bfloat16():
    q = torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(DitAccelError, match="no bfloat16"):
        sparse_linear_attention(q, q, q, torch.zeros(16, 16), topk=1, block=16, impl="triton")


def marginal_call(hot=1.0, topk=1, skip=1, block=16, block_q=None, heads=2, tokens=70):
    """Arguments of `marginal`; the first 16 tokens have keys `hot` times as large."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 24) for _ in range(3))
    q, k = q.abs(), k.abs()
    k[:, :, :16] *= hot
    cuts = cuts_of((1, 1, tokens), block, block_q=block_q)
    lists = route(q, k, cuts, topk, skip)
    return *(x.to(DEVICE) for x in (q, k, v, *lists)), cuts.pack(), "relu"


def marginal(q, k, v, critical, negligible, cuts, feature_map):
    """The linear branch of scope "marginal" alone: output, denominators [B, H, N, 1] and modes.

    Critical blocks count as negligible, so that nothing is critical, and the projection is the identity.
    """
    unit = torch.eye(q.shape[-1], device=q.device)
    both = torch.cat([critical, negligible], dim=-1).sort(-1)[0]
    # a projection that wants a gradient makes any call one for training
    out, _, _, _, denominators, modes = attend(
        q, k, v, critical[..., :0], both, unit.requires_grad_(), None, cuts, feature_map, "marginal"
    )
    return out, denominators[..., None], modes


@pytest.mark.parametrize("hot", [1.0, 1e6])
def test_huge_critical_keys_do_not_cancel(hot):
    """What is left beside keys 1e6 times as large is summed by itself, not as a difference."""
    arguments = marginal_call(hot=hot)
    out, denominators, _ = (x.detach().cpu() for x in marginal(*arguments))
    tensors = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in arguments[:5]]
    exact, sums = linear_marginal(*tensors, *arguments[5:])
    assert (out - exact).abs().max() < 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    torch.testing.assert_close(denominators.double(), sums, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


def check_marginal_gradients(q, k, v, critical, negligible, *rest):
    """dq, dk and dv of `marginal` against fp64."""
    gradient = torch.randn(q.shape)

    def results(function, dtype, device):
        tensors = [x.detach().to(dtype).to(device).requires_grad_() for x in (q, k, v)]
        lists = [x.to(device) for x in (critical, negligible)]
        out, *_ = function(*tensors, *lists, *rest)
        return [x.cpu() for x in torch.autograd.grad(out, tensors, gradient.to(tensors[0]))]

    got = results(marginal, torch.float32, DEVICE)
    plain = results(linear_marginal, torch.float32, "cpu")
    exact = results(linear_marginal, torch.float64, "cpu")
    for name, *values in zip(("dq", "dk", "dv"), got, plain, exact, strict=True):
        # a total is up to twice what is left of it, and it and what is subtracted are rounded once each
        assert_accurate(name, *values, magnitude=4 * values[-1].abs())


@pytest.mark.parametrize("hot, alone", [(1.0, False), (4.0, None), (1e3, True)], ids=["totals", "both", "one by one"])
@pytest.mark.parametrize("block_q", [None, 32])
def test_marginal_gradients(hot, alone, block_q):
    """Query blocks by totals, one by one, and both in one call."""
    q, k, v, *rest = marginal_call(hot=hot, block_q=block_q)
    q[:, :, 32:, ::2] *= 0.01  # some queries see less of the large keys
    k[:, :, :16, 1::2] *= 0.01 if alone is None else 1.0
    modes = marginal(q, k, v, *rest)[2].bool()
    assert (modes.all() if alone else not modes.any()) if alone is not None else modes.any() and not modes.all()
    check_marginal_gradients(q, k, v, *rest)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the launch table says how many rows a step has")
@pytest.mark.parametrize("hot", [1.0, 1e3], ids=["totals", "one by one"])
def test_blocks_in_steps(monkeypatch, hot):
    """Blocks of 32 tokens in steps of 16, dk and dv of half a block a program: the same mathematics."""
    monkeypatch.setattr(triton_configs, "launches", lambda *_: (Launch(4, 1, 16),))
    monkeypatch.setattr(triton_configs, "key_rows", lambda *_: 16)
    q, k, v, critical, negligible, *rest = marginal_call(hot=hot, skip=0, block=32)
    assert marginal(q, k, v, critical, negligible, *rest)[2].bool().all() == (hot > 1)
    check_marginal_gradients(q, k, v, critical, negligible, *rest)
    exact, _ = linear_marginal(*(x.double() for x in (q, k, v)), critical, negligible, *rest)
    plain, _ = linear_marginal(q, k, v, critical, negligible, *rest)
    out, *_ = marginal(q, k, v, critical, negligible, *rest)
    assert_accurate("out", out, plain, exact, magnitude=4 * exact.abs())
    order = Geometry.unpack(rest[0]).key_order
    means = ops.state(k, v, rest[0], order.blocks, "relu")[2]
    torch.testing.assert_close(means, block_means(k, order), rtol=1e-6, atol=1e-7)


def test_the_means_of_the_state_choose_the_same_blocks():
    """What a call routes by is what `route` reports."""
    cuts = cuts_of((3, 3, 5), 16, (2, 2, 4), 32, (2, 4, 4))
    q, k = inputs("random", 45, torch.float32)
    means = ops.state(k, k, cuts.pack(), cuts.key_order.blocks, "softmax")[2]
    chosen = classify(q, means, cuts.query_order, single_blocks(means), 3, 2, "triton")
    for got, wanted in zip(chosen, route(q, k, cuts, 3, 2, "triton"), strict=True):
        assert torch.equal(got, wanted)


def test_no_marginal_block_gives_zero():
    out, *_ = marginal(*marginal_call(topk=4, skip=1))
    assert (out == 0).all()
