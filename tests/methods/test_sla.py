"""SLA end to end: the module and the plan against masked dense attention plus the linear formula, in fp64."""

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.errors import DitAccelError
from dit_accel.kernels.sla.features import EPSILON, apply_map
from dit_accel.methods.sla import Config, SparseLinearAttention
from dit_accel.plans import attention, plan
from dit_accel.tokens import TokenGrid


def token_map(mask):
    """A BlockMask over tokens in model order: bool [B, H, N, N]."""

    def block_of(order):
        tokens = order.index()
        slots = (tokens >= 0).nonzero().squeeze(1)
        return slots[tokens[slots].argsort()] // order.block

    return mask.dense()[..., block_of(mask.query_order), :][..., block_of(mask.key_order)]


def padding_text(grid, text_lens):
    """Text tokens that are never keys: bool [B, N]."""
    position = torch.arange(grid.tokens) - grid.text_start
    return (position >= text_lens[:, None]) & (position < grid.text)


def formula(q, k, v, weight, bias, *, routing, grid, config, hidden, scale=None):
    """What SLA means, in the dtype of q, by plain PyTorch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    seen = token_map(routing.critical) & ~hidden[:, None, None, :]
    out = (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    weights = apply_map(q, config.feature_map) @ apply_map(k, config.feature_map).mT * token_map(routing.linear)
    rest = (weights @ v) / (weights.sum(-1, keepdim=True) + EPSILON)
    visual = torch.zeros(grid.tokens, 1, dtype=torch.bool)
    visual[grid.visual_start : grid.visual_start + grid.visual] = True
    return torch.where(visual, out + F.linear(rest, weight, bias), out)


def magnitudes(q, k, v, weight, gradient, *, dtype, routing, grid, config, hidden, scale=None):
    """What is rounded, as sums of magnitudes, on the way to the gradients that are made of differences.

    Softmax: dS = P (dP - delta) counts as P (|dP| + |delta|), its dot products as |g| |v| and |g| |o|. The quotient of
    the linear branch and the softmax of its feature map have derivatives of the same form. P = exp(logit - LSE), with
    an LSE kept in fp32 and logits that are computed again: |LSE| + |q| |k| more roundings, of fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    seen = token_map(routing.critical) & ~hidden[:, None, None, :]
    logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    exponent = logits.logsumexp(-1, keepdim=True).abs() + q.abs() @ k.abs().mT * scale
    p = logits.softmax(-1)
    rounded = p * (1 + exponent * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    ds = rounded * (gradient.abs() @ v.abs().mT + (gradient * (p @ v)).abs().sum(-1, keepdim=True)) * scale

    phi_q, phi_k = apply_map(q, config.feature_map), apply_map(k, config.feature_map)
    products = (phi_q @ phi_k.mT) * token_map(routing.linear)
    sums = products.sum(-1, keepdim=True) + EPSILON
    pulled = gradient @ weight
    through_quotient = pulled.abs() @ v.abs().mT + (pulled * (products @ v / sums)).abs().sum(-1, keepdim=True)
    dw = token_map(routing.linear) * through_quotient / sums

    def through_map(x, of_phi):
        phi = apply_map(x, config.feature_map)
        if config.feature_map == "softmax":
            return phi * (of_phi + (phi * of_phi).sum(-1, keepdim=True))
        return of_phi * (phi.clamp(max=1) if config.feature_map == "elu" else x > 0)

    dq = ds @ k.abs() + through_map(q, dw @ phi_k)
    dk = ds.mT @ q.abs() + through_map(k, dw.mT @ phi_q)
    dv = rounded.mT @ gradient.abs() + (products / sums).mT @ pulled.abs()
    return {"dq": dq.max(), "dk": dk.max(), "dv": dv.max()}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: its grid, settings and input."""

    grid: TokenGrid
    config: dict
    dim: int = 64
    dtype: torch.dtype = torch.float32
    size: float = 1.0
    text_lens: tuple | None = None
    impl: str = "portable"
    batch: int = 2
    heads: int = 2
    factor: float | None = None


def setup(case):
    """Module with a random projection, inputs of the case, and where padding text lies."""
    torch.manual_seed(0)
    module = SparseLinearAttention(case.dim, **case.config)
    torch.nn.init.normal_(module.proj.weight, std=case.dim**-0.5)
    torch.nn.init.normal_(module.proj.bias)
    shape = (case.batch, case.grid.tokens, case.heads, case.dim)
    q, k, v = (case.size * torch.randn(shape).transpose(1, 2) for _ in range(3))
    lens = torch.tensor(case.text_lens or [case.grid.text] * case.batch)
    return module, [x.to(case.dtype) for x in (q, k, v)], lens, padding_text(case.grid, lens)


def run(function, tensors, gradient):
    """Output and gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, gradient.to(out.dtype))
    names = ("out", "dq", "dk", "dv", "dweight", "dbias")
    return dict(zip(names, (out.detach(), *gradients), strict=True))


def check(case):
    module, (q, k, v), lens, hidden = setup(case)
    weights = [module.proj.weight.detach(), module.proj.bias.detach()]
    routing = module.route(q, k, case.grid)
    gradient = torch.randn(q.shape).to(case.dtype)
    fixed = {"routing": routing, "grid": case.grid, "config": module.config, "hidden": hidden, "scale": case.factor}

    def call(q, k, v, weight, bias):
        # What must not be read is NaN.
        k, v = (x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v))
        device = "cuda" if case.impl == "triton" and not INTERPRETED else "cpu"
        q, k, v, weight, bias = (x.to(device) for x in (q, k, v, weight, bias))
        arguments = {"grid": case.grid, "text_lens": lens if case.text_lens else None, "impl": case.impl}
        state = {"proj.weight": weight, "proj.bias": bias}
        return torch.func.functional_call(module, state, (q, k, v), {**arguments, "scale": case.factor}).cpu()

    actual = run(call, [q, k, v, *weights], gradient)
    exact = run(lambda *x: formula(*x, **fixed), [x.double() for x in (q, k, v, *weights)], gradient)
    plain = run(lambda *x: formula(*x, **fixed), [q, k, v, *(x.to(case.dtype) for x in weights)], gradient)
    assert actual["out"].dtype == case.dtype and actual["dweight"].dtype == torch.float32
    sums = magnitudes(*(x.double() for x in (q, k, v, weights[0], gradient)), dtype=case.dtype, **fixed)
    for name, truth in exact.items():
        band = torch.finfo(case.dtype).eps * sums.get(name, truth.abs().max())
        # where plain PyTorch leaves the range of half precision, the band alone counts
        budget = 2 * ((plain[name].double() - truth).abs().max().nan_to_num(0.0, 0.0) + band)
        error = (actual[name].double() - truth).abs().max()
        assert error <= budget, f"{name}: error {error:.3g} above {budget:.3g}"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VIDEO = TokenGrid(3, 5, 9)
SHORT = {"topk": 0.3, "block": 16}
MARGINAL = {**SHORT, "skip": 0.25, "linear_scope": "marginal"}
TEXT_LAST = TokenGrid(3, 5, 9, text=21, reference=45)
TEXT_FIRST = TokenGrid(3, 5, 9, text=21, text_first=True)

CASES = {
    "one-token": Case(TokenGrid(1, 1, 1), {}),
    "one-token-marginal": Case(TokenGrid(1, 1, 1), {"linear_scope": "marginal"}),
    "63": Case(TokenGrid(1, 7, 9), {}, dim=40),
    "64": Case(TokenGrid(1, 8, 8), {}, dim=128),
    "65-marginal": Case(TokenGrid(1, 5, 13), {"linear_scope": "marginal", "skip": 0.5}),
    "1000": Case(TokenGrid(10, 10, 10), {"topk": 0.2}, heads=1),
    "1000-marginal": Case(TokenGrid(10, 10, 10), {"topk": 0.2, "linear_scope": "marginal"}, heads=1, size=4.0),
    "all": Case(VIDEO, SHORT),
    "all-x4": Case(VIDEO, SHORT, size=4.0),
    "all-x16": Case(VIDEO, SHORT, size=16.0, dim=128),
    "marginal": Case(VIDEO, MARGINAL),
    "marginal-x16": Case(VIDEO, MARGINAL, size=16.0, dim=40),
    "scale-given": Case(VIDEO, MARGINAL, factor=0.3),
    "elu": Case(VIDEO, {**SHORT, "feature_map": "elu"}),
    "relu-marginal": Case(VIDEO, {**MARGINAL, "feature_map": "relu"}, size=4.0),
    "tiles": Case(VIDEO, {**SHORT, "order": "tile"}),
    "tiles-marginal": Case(VIDEO, {**MARGINAL, "order": "tile"}, size=4.0),
    "text-last": Case(TEXT_LAST, SHORT, text_lens=(21, 3)),
    "text-last-marginal": Case(TEXT_LAST, MARGINAL, text_lens=(0, 17), size=4.0),
    "text-first": Case(TEXT_FIRST, MARGINAL, text_lens=(5, 21)),
    "text-first-tiles": Case(TEXT_FIRST, {**SHORT, "order": "tile"}, text_lens=(1, 20)),
    "text-whole": Case(TEXT_LAST, SHORT),
    "bf16": Case(VIDEO, SHORT, dtype=torch.bfloat16),
    "bf16-marginal-x4": Case(VIDEO, MARGINAL, dtype=torch.bfloat16, size=4.0),
    "bf16-text-x16": Case(TEXT_FIRST, MARGINAL, dtype=torch.bfloat16, size=16.0, text_lens=(7, 0)),
    "fp16-elu": Case(VIDEO, {**MARGINAL, "feature_map": "elu"}, dtype=torch.float16),
    "reference-all": Case(TEXT_LAST, SHORT, text_lens=(21, 3), impl="reference"),
    "reference-marginal-tiles": Case(TEXT_FIRST, {**MARGINAL, "order": "tile"}, text_lens=(9, 2), impl="reference"),
    "reference-bf16": Case(VIDEO, MARGINAL, dtype=torch.bfloat16, impl="reference"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case):
    check(case)


TINY = TokenGrid(2, 3, 7)
TINY_TEXT = TokenGrid(2, 3, 7, text=5, text_first=True, reference=3)
ONE = {"batch": 1, "heads": 1, "impl": "triton"}
TRITON_CASES = {
    "one-token": Case(TokenGrid(1, 1, 1), {"block": 16}, dim=16, **ONE),
    "65": Case(TokenGrid(1, 5, 13), {"topk": 0.5}, dim=40, **ONE),
    "x16": Case(TINY, SHORT, size=16.0, dim=32, **ONE),
    "elu-tiles-x4": Case(TINY, {**SHORT, "feature_map": "elu", "order": "tile"}, size=4.0, dim=24, **ONE),
    "relu-text": Case(TINY_TEXT, {**SHORT, "feature_map": "relu"}, dim=16, text_lens=(2, 5), heads=2, impl="triton"),
    "fp16": Case(TINY, SHORT, dtype=torch.float16, dim=32, **ONE),
    "fp16-elu-x16": Case(TINY, {**SHORT, "feature_map": "elu"}, dtype=torch.float16, size=16.0, dim=16, **ONE),
    "fp16-x16": Case(TINY, SHORT, dtype=torch.float16, size=16.0, dim=32, **ONE),
    "marginal": Case(TINY, MARGINAL, dim=40, **ONE),
    "marginal-x16": Case(TokenGrid(1, 7, 15), {**MARGINAL, "topk": 0.2}, size=16.0, dim=16, **ONE),
    "marginal-text": Case(TINY_TEXT, MARGINAL, dim=16, text_lens=(2, 5), size=4.0, impl="triton"),
    "marginal-tiles-relu": Case(TINY, {**MARGINAL, "order": "tile", "feature_map": "relu"}, dim=16, **ONE),
    "fp16-marginal": Case(TINY, MARGINAL, dtype=torch.float16, dim=16, **ONE),
    "fp16-marginal-elu-x4": Case(TINY, MARGINAL | {"feature_map": "elu"}, dtype=torch.float16, size=4.0, dim=24, **ONE),
    "fp16-text-x4": Case(TINY_TEXT, SHORT, dtype=torch.float16, size=4.0, dim=16, text_lens=(0,), **ONE),
}


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or CUDA")
@pytest.mark.parametrize("case", TRITON_CASES.values(), ids=TRITON_CASES)
def test_triton_forward_and_gradients(case):
    check(case)


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_gradcheck(scope):
    """Every gradient, projection included, against finite differences, with text and a ragged tail."""
    torch.manual_seed(0)
    grid = TokenGrid(1, 3, 5, text=3)
    module = SparseLinearAttention(4, topk=0.3, skip=0.3, block=4, linear_scope=scope)
    tensors = [torch.randn(1, 1, grid.tokens, 4, dtype=torch.float64) for _ in range(3)]
    tensors += [torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]

    def call(q, k, v, weight, bias):
        state = {"proj.weight": weight, "proj.bias": bias}
        arguments = {"grid": grid, "text_lens": torch.tensor([2])}
        return torch.func.functional_call(module, state, (q, k, v), arguments)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors], fast_mode=True)


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_starts_as_pure_top_k(scope):
    """Projection zero: the module, the plan without a module, and attention over the critical blocks are the same."""
    case = Case(TEXT_LAST, {**SHORT, "linear_scope": scope})
    module = SparseLinearAttention(case.dim, **case.config)
    assert not module.proj.weight.any() and not module.proj.bias.any()
    _, (q, k, v), _, _ = setup(case)
    seen = token_map(module.route(q, k, case.grid).critical)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    out = module(q, k, v, grid=case.grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(out, attention(q, k, v, plan("sla", case.grid, **case.config)))
    # At the start the projection learns, though nothing flows through it yet.
    (gradient,) = torch.autograd.grad(out.square().sum(), [module.proj.weight])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("grid", [VIDEO, TEXT_LAST, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_top_k_of_everything_is_dense(grid, order):
    settings = plan("sla", grid, topk=1.0, skip=0.0, block=16, order=order)
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 64)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, settings), expected, rtol=0, atol=2e-6)
    assert settings.pairs == grid.tokens**2 and settings.density == 1


@pytest.mark.parametrize("grid", [VIDEO, TEXT_LAST, TEXT_FIRST], ids=str)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_route_partitions_the_visual_blocks(grid, order):
    module = SparseLinearAttention(16, topk=0.3, skip=0.25, linear_scope="marginal", block=16, order=order)
    q, k = torch.randn(2, 2, 3, grid.tokens, 16)
    routing = module.route(q, k, grid)
    visual, blocks = routing.critical.query_order.visual_blocks, routing.critical.query_order.blocks
    critical, skipped, linear = (mask.dense().int() for mask in routing)
    assert (critical + skipped + linear == 1).all()
    assert (critical[..., visual:, :] == 1).all() and (critical[..., visual:] == 1).all()
    inside = [m[..., :visual, :visual].sum(-1) for m in (critical, skipped, linear)]
    kept, dropped = int(0.3 * visual), int(0.25 * visual)
    assert all((m == n).all() for m, n in zip(inside, (kept, dropped, visual - kept - dropped), strict=True))
    for mask in routing:
        assert mask.kv_counts.shape == (2, 3, blocks) and mask.kv_indices.dtype == torch.int32
        assert not mask.partial.any()

    everything = SparseLinearAttention(16, topk=0.3, block=16, order=order).route(q, k, grid)
    assert torch.equal(everything.critical.dense(), routing.critical.dense())
    assert everything.skipped.visited == 0
    assert everything.linear.dense()[..., :visual, :visual].all()
    assert everything.linear.visited == 6 * visual**2


def test_routing_ignores_text_and_carries_no_gradient():
    """Text may be anything, NaN too, without moving a visual block."""
    module = SparseLinearAttention(16, **SHORT)
    q, k = torch.randn(2, 1, 2, TEXT_FIRST.tokens, 16)
    before = module.route(q, k, TEXT_FIRST).critical
    poisoned = [x.clone() for x in (q, k)]
    for x in poisoned:
        x[:, :, : TEXT_FIRST.text] = torch.nan
    after = module.route(*poisoned, TEXT_FIRST).critical
    assert torch.equal(before.kv_indices, after.kv_indices)


def test_runs_are_bit_equal():
    case = Case(TEXT_LAST, MARGINAL, text_lens=(21, 3))
    module, (q, k, v), lens, _ = setup(case)
    gradient = torch.randn(q.shape)
    first = None
    for _ in range(10):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = module(*leaves, grid=case.grid, text_lens=lens)
        results = [out.detach(), *torch.autograd.grad(out, [*leaves, *module.parameters()], gradient)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize(
    "grid, settings",
    [
        (None, {}),
        (None, {"linear_scope": "marginal"}),
        (TEXT_FIRST, {"order": "tile"}),
        (TEXT_LAST, {"linear_scope": "marginal"}),
    ],
    ids=str,
)
def test_compiles_whole_on_the_first_call(grid, settings):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = SparseLinearAttention(32, topk=0.3, block=16, **settings)
    torch.nn.init.normal_(module.proj.weight)
    tokens = 150 if grid is None else grid.tokens
    inputs = [torch.randn(1, 2, tokens, 32, requires_grad=True) for _ in range(3)]
    lens = None if grid is None else torch.tensor([4])
    results = []
    for call in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        out = call(*inputs, grid=grid, text_lens=lens)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_lengths_share_one_dynamic_graph(scope):
    """One graph for the first length, one for all others; more blocks kept and dropped make no new one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = SparseLinearAttention(16, topk=0.1, block=16, linear_scope=scope)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for tokens in (700, 501, 1000, 333, 640):
        q = torch.randn(1, 2, tokens, 16)
        assert torch.equal(compiled(q, q, q), module(q, q, q))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("grid", [VIDEO, TEXT_LAST], ids=str)
def test_output_is_laid_out_for_the_flatten(grid):
    module = SparseLinearAttention(16, **SHORT)
    q = torch.randn(2, grid.tokens, 3, 16).transpose(1, 2)
    assert module(q, q, q, grid=grid).transpose(1, 2).is_contiguous()


def test_autocast_routes_and_sums_in_fp32():
    """Under autocast the call is that of the cast inputs, bit for bit: no product of ours is cast again."""
    case = Case(VIDEO, MARGINAL)
    module, (q, k, v), _, _ = setup(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(q, k, v, grid=case.grid)
    assert torch.equal(out, module(*(x.bfloat16() for x in (q, k, v)), grid=case.grid))


def test_plan_numbers():
    """Wan2.1 at 480p: 32,760 tokens are 512 blocks with a tail of 56, of which 5 % are 25."""
    wan = plan("sla", TokenGrid(21, 30, 52))
    assert (wan.visited, wan.total) == (512 * 25, 512 * 512)
    assert wan.pairs == 32760 * 25 * 64
    text = plan("sla", TokenGrid(2, 8, 8, text=70, reference=64), topk=0.5)
    assert (text.visited, text.total) == (2 * (1 + 3) + 3 * 5, 25)
    assert text.pairs == 128 * (64 + 134) + 134 * 262
    assert plan("sla", TokenGrid(1, 5, 5), topk=0.01).visited == 1


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_pairs_bound_the_routed_pairs_tightly(order):
    """Exact where all blocks are whole; where some are not, no call attends more and a call with the largest does."""
    for grid, exact in ((TokenGrid(2, 8, 8, text=5), True), (TokenGrid(3, 5, 9), False)):
        settings = plan("sla", grid, topk=0.3, block=16, order=order)
        module = SparseLinearAttention(8, topk=0.3, block=16, order=order)
        q, k = torch.randn(2, 1, 8, grid.tokens, 8)
        pairs = token_map(module.route(q, k, grid).critical).sum((-1, -2))
        assert (pairs == settings.pairs).all() if exact else (pairs <= settings.pairs).all()
        assert settings.density == settings.pairs / grid.tokens**2
        # Equal scores keep the first blocks, which are whole here.
        ties = token_map(module.route(torch.ones_like(q), torch.ones_like(k), grid).critical).sum((-1, -2))
        assert (ties == settings.pairs).all()


def test_tiles_are_compact_and_pad_little():
    assert plan("sla", TokenGrid(21, 45, 80), order="tile").order.tile == (2, 4, 8)
    assert plan("sla", TokenGrid(16, 32, 32), order="tile").order.tile == (4, 4, 4)
    assert plan("sla", TokenGrid(1, 64, 64), order="tile").order.tile == (1, 8, 8)


def test_what_a_plan_cannot_give_is_refused():
    settings = plan("sla", VIDEO)
    for ask in (settings.token_mask, settings.block_mask, settings.image):
        with pytest.raises(DitAccelError, match=r"routes by content.*SparseLinearAttention\.route"):
            ask()
    with pytest.raises(DitAccelError, match="SparseLinearAttention as its module, got Linear"):
        settings.attend(*torch.randn(3, 1, 1, VIDEO.tokens, 8), module=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"topk": 0}, "topk .* above 0 and at most 1; got 0"),
        ({"topk": 1.5}, "topk .* got 1.5"),
        ({"skip": -0.1}, "skip .* got -0.1"),
        ({"topk": 0.95, "linear_scope": "marginal"}, "cannot exceed 1 together; got 0.95 and 0.1"),
        ({"topk": 0.8, "skip": 0.3}, "cannot exceed 1 together; got 0.8 and 0.3"),
        ({"feature_map": "hedgehog"}, "feature_map must be one of softmax, elu, relu; got 'hedgehog'"),
        ({"linear_scope": "none"}, "linear_scope must be one of all, marginal; got 'none'"),
        ({"order": "hilbert"}, "order must be one of raster, tile; got 'hilbert'"),
        ({"block": 0}, "block .* at least 1; got 0"),
        ({"block": 64.0}, "block .* got 64.0"),
        ({"topk": "much"}, "topk .* got 'much'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(DitAccelError, match=message):
        Config(**settings)


def test_shares_become_blocks():
    config = Config(topk=0.05, skip=0.10, linear_scope="marginal")
    assert [config.kept(n) for n in (1, 19, 20, 39, 512)] == [1, 1, 1, 1, 25]
    assert [config.dropped(n) for n in (1, 9, 10, 512)] == [0, 0, 1, 51]
    assert Config(topk=0.7, skip=0.3, linear_scope="marginal").kept(10) == 7
    assert Config(topk=1.0).kept(3) == 3 and Config().dropped(100) == 0
    assert Config(topk=0.1, skip=0.9, linear_scope="marginal").dropped(1) == 0


def test_calls_that_do_not_fit_are_refused():
    module = SparseLinearAttention(16)
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(DitAccelError, match="built for head_dim 16, the call has 8"):
        module(q[..., :8], q[..., :8], q[..., :8])
    with pytest.raises(DitAccelError, match=r"must be \[batch, heads, 135, head_dim\]"):
        module(q, q, q, grid=VIDEO)
    with pytest.raises(DitAccelError, match="all alike"):
        module(q, q[:, :, :10], q[:, :, :10])
    with pytest.raises(DitAccelError, match="pass grid=TokenGrid"):
        SparseLinearAttention(16, order="tile")(q, q, q)
    with pytest.raises(DitAccelError, match="impl must be one of auto, reference, portable, triton; got 'cuda'"):
        module(q, q, q, impl="cuda")
