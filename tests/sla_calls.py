"""Whole SLA calls against their definition, masked dense attention plus the linear formula, in fp64."""

import dataclasses
import os

import torch
import torch.nn.functional as F

from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.router.api import classify
from dit_accel.kernels.sla import api
from dit_accel.kernels.sla.arguments import EPSILON, SlaArguments, apply_map, learned_inputs
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VIDEO = TokenGrid(3, 5, 9)
SHORT = {"topk": 0.3, "block": 16}
MARGINAL = {**SHORT, "skip": 0.25, "linear_scope": "marginal"}
WIDE = {"block_q": 32}  # beside either of them
TEXT_LAST = TokenGrid(3, 5, 9, text=21, conditioning=45)
TEXT_FIRST = TokenGrid(3, 5, 9, text=21, text_first=True)


def cuts_of(grid, block, tile=None, block_q=None, tile_q=None):
    """How both sides are cut; queries as keys unless said otherwise."""
    return Geometry(grid, grid, block_q or block, block, tile_q or tile, tile, 0, 0, own_queries=True)


def route(q, k, cuts, topk, skip, impl="portable"):
    """Critical and negligible blocks of visual tokens."""
    return classify(q, k, *cuts.orders, topk, skip, impl)


def sparse_linear_attention(q, *tensors, grid=None, text=0, block=64, block_q=None, tile=None, **options):
    """The output of `api.sparse_linear_attention` in raster order; without a grid all tokens are one row."""
    sequence = TokenGrid(*(grid or (1, 1, q.shape[2])), text=text)
    keys = TokenOrder(sequence, block, tile)
    k, v, *weights = tensors
    learned = dict(zip(("weight", "bias"), weights, strict=False))
    orders = {"query_order": TokenOrder(sequence, block_q or block, tile), "key_order": keys}
    call = SlaArguments(**{"bias": None, "scale": q.shape[-1] ** -0.5} | learned | orders | options)
    return api.sparse_linear_attention(q, k, v, call)[0]


def token_map(mask):
    """A BlockMask over tokens in model order: bool [B, H, N, N]."""

    def block_of(order):
        tokens = order.index()
        slots = (tokens >= 0).nonzero().squeeze(1)
        return slots[tokens[slots].argsort()] // order.block

    return mask.dense()[..., block_of(mask.query_order), :][..., block_of(mask.key_order)]


def linear_map(routing, config):
    """The pairs of the linear branch over tokens in model order: bool [B, H, N, N]."""
    if config.linear_scope == "marginal":
        return token_map(routing.marginal)
    order = routing.critical.query_order
    visual = torch.zeros(order.grid.tokens, dtype=torch.bool)
    visual[order.grid.visual_start : order.grid.visual_start + order.grid.visual] = True
    return visual[:, None] & visual


def padding_text(grid, text_lens):
    """Text tokens that are never keys: bool [B, N]."""
    position = torch.arange(grid.tokens) - grid.text_start
    return (position >= text_lens[:, None]) & (position < grid.text)


def formula(q, k, v, weight, bias, *features, routing, grid, config, hidden, scale=None):
    """What SLA means, in the dtype of q, by plain PyTorch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    seen = token_map(routing.critical) & ~hidden[:, None, None, :]
    # a query that sees nothing exactly gets 0
    out = (q @ k.mT * scale).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen.any(-1, keepdim=True) @ v
    a, b = (apply_map(x.to(q.dtype), config.feature_map) for x in learned_inputs(q, k, features or None))
    weights = a @ b.mT * linear_map(routing, config)
    rest = (weights @ v) / (weights.sum(-1, keepdim=True) + EPSILON)
    visual = torch.zeros(grid.tokens, 1, dtype=torch.bool)
    visual[grid.visual_start : grid.visual_start + grid.visual] = True
    return torch.where(visual, out + F.linear(rest, weight, bias), out)


def magnitudes(q, k, v, weight, _bias, *features, gradient, dtype, routing, grid, config, hidden, scale=None):
    """What is rounded, as sums of magnitudes, on the way to the gradients that are made of differences.

    Softmax: dS = P (dP - delta) counts as P (|dP| + |delta|), its dot products as |g| |v| and |g| |o|. The quotient of
    the linear branch and the softmax of its feature map have derivatives of the same form. P = exp(logit - LSE), with
    an LSE kept in fp32 and logits that are computed again: |LSE| + |q| |k| more roundings, of fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    seen = token_map(routing.critical) & ~hidden[:, None, None, :]
    logits = (q @ k.mT * scale).masked_fill(~seen, torch.finfo(q.dtype).min)
    exponent = logits.logsumexp(-1, keepdim=True).abs() + q.abs() @ k.abs().mT * scale
    p = logits.softmax(-1) * seen
    rounded = p * (1 + exponent * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    ds = rounded * (gradient.abs() @ v.abs().mT + (gradient * (p @ v)).abs().sum(-1, keepdim=True)) * scale

    mapped = learned_inputs(q, k, features or None)
    phi_q, phi_k = (apply_map(x, config.feature_map) for x in mapped)
    products = (phi_q @ phi_k.mT) * linear_map(routing, config)
    sums = products.sum(-1, keepdim=True) + EPSILON
    pulled = gradient @ weight
    through_quotient = pulled.abs() @ v.abs().mT + (pulled * (products @ v / sums)).abs().sum(-1, keepdim=True)
    dw = linear_map(routing, config) * through_quotient / sums

    def through_map(side, of_phi):
        x, phi = mapped[side], (phi_q, phi_k)[side]
        if config.feature_map in ("softmax", "hedgehog"):
            halves = zip(phi.split(x.shape[-1], -1), of_phi.split(x.shape[-1], -1), strict=True)
            terms = sum(half * (upstream + (half * upstream).sum(-1, keepdim=True)) for half, upstream in halves)
            return terms @ features[0][side].abs() if features else terms
        if config.feature_map == "focused":
            size = phi.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
            along = (phi * of_phi).sum(-1, keepdim=True) / size
            return 3 * (of_phi + along * phi / size) * phi / x.abs().clamp_min(EPSILON) + along * x.relu() / size
        return of_phi * (phi.clamp(max=1) if config.feature_map == "elu" else x > 0)

    dq = ds @ k.abs() + through_map(0, dw @ phi_k)
    dk = ds.mT @ q.abs() + through_map(1, dw.mT @ phi_q)
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
    module = SparseLinearAttention(case.dim, case.heads, **case.config)
    for part in module.children():
        torch.nn.init.normal_(part.weight, std=case.dim**-0.5)
        torch.nn.init.normal_(part.bias)
    shape = (case.batch, case.grid.tokens, case.heads, case.dim)
    q, k, v = (case.size * torch.randn(shape).transpose(1, 2) for _ in range(3))
    lens = torch.tensor(case.text_lens or [case.grid.text] * case.batch)
    return module, [x.to(case.dtype) for x in (q, k, v)], lens, padding_text(case.grid, lens)


def run(function, tensors, gradient):
    """Output and gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, gradient.to(out.dtype))
    names = ("out", "dq", "dk", "dv", "dweight", "dbias", "of the map's weight", "of the map's bias")
    return dict(zip(names, (out.detach(), *gradients), strict=False))


def check(case):
    module, (q, k, v), lens, hidden = setup(case)
    weights = [weight.detach() for weight in module.parameters()]
    routing = module.route(q, k, case.grid)
    gradient = torch.randn(q.shape).to(case.dtype)
    fixed = {"routing": routing, "grid": case.grid, "config": module.config, "hidden": hidden, "scale": case.factor}

    def call(q, k, v, *weights):
        # What must not be read is NaN.
        k, v = (x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v))
        device = "cuda" if case.impl == "triton" and not INTERPRETED else "cpu"
        q, k, v, *weights = (x.to(device) for x in (q, k, v, *weights))
        arguments = {"grid": case.grid, "text_lens": lens if case.text_lens else None, "impl": case.impl}
        state = dict(zip(dict(module.named_parameters()), weights, strict=True))
        return torch.func.functional_call(module, state, (q, k, v), {**arguments, "scale": case.factor}).cpu()

    actual = run(call, [q, k, v, *weights], gradient)
    wide = [x.double() for x in (q, k, v, *weights)]
    exact = run(lambda *x: formula(*x, **fixed), wide, gradient)
    plain = run(lambda *x: formula(*x, **fixed), [q, k, v, *(x.to(case.dtype) for x in weights)], gradient)
    assert actual["out"].dtype == case.dtype and actual["dweight"].dtype == torch.float32
    sums = magnitudes(*wide, gradient=gradient.double(), dtype=case.dtype, **fixed)
    for name, truth in exact.items():
        band = torch.finfo(case.dtype).eps * sums.get(name, truth.abs().max())
        # where plain PyTorch leaves the range of half precision, the band alone counts
        budget = 2 * ((plain[name].double() - truth).abs().max().nan_to_num(0.0, 0.0) + band)
        error = (actual[name].double() - truth).abs().max()
        assert error <= budget, f"{name}: error {error:.3g} above {budget:.3g}"
