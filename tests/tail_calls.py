"""Exact attention with the tail, against the sums that it means over single tokens, in fp64."""

import dataclasses
import os

import torch
from accuracy import assert_accurate
from roundings import gradient_sizes

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse.api import attend_visual
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.impls import Facts
from dit_accel.kernels.tail.api import attend_with_tail, with_first_order, with_tail
from dit_accel.order import TokenOrder
from dit_accel.plans.plan import attention
from dit_accel.plans.sampled import SampledQueries, pooled
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TEXT = {"text": 11, "conditioning": 7}
VIDEO = TokenGrid(3, 5, 9)
NAMES = ("out", "lse", "dq", "dk", "dv")
# Roundings of eps / 2 beyond those of plain PyTorch, in eps. Output: the exact part, the tail, their sum. Gradients:
# the exact part's output and its gradient, each part's share, their sum.
PARTS = {"out": 1.5, "dq": 2.5, "dk": 2.5, "dv": 2.5}
# By one kernel. Output: its rounding. dv: each part's, their sum (the gradients are added in the inputs' dtype, the
# first one behind a rounding of its own). dq and dk: the rounded output, from which delta is made, besides.
ONE_KERNEL = {"out": 0.5, "dq": 1.5, "dk": 1.5, "dv": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `listed` is the chance of a block to be listed, `dropped` that of another one to be in no tail."""

    grid: TokenGrid = VIDEO
    block_q: int = 16
    block_k: int = 16
    tile_q: tuple | None = None
    tile_k: tuple | None = None
    listed: float = 0.3
    dropped: float | None = None
    first_order: bool = False
    text_lens: tuple | None = None
    dim: int = 24
    dtype: torch.dtype = torch.float32
    size: float = 1.0
    scale: float | None = None
    batch: int = 2
    heads: int = 2
    impl: str = "portable"

    @property
    def orders(self):
        return TokenOrder(self.grid, self.block_q, self.tile_q), TokenOrder(self.grid, self.block_k, self.tile_k)

    @property
    def device(self):
        return "cpu" if INTERPRETED or self.impl in ("portable", "reference") else "cuda"


def setup(case):
    """q, k, v, upstream gradients of output and LSE, and maps of listed and dropped blocks."""
    torch.manual_seed(0)
    shape = case.batch, case.grid.tokens, case.heads, case.dim
    tensors = [(case.size * torch.randn(shape).transpose(1, 2)).to(case.dtype) for _ in range(3)]
    upstream = torch.randn(case.batch, case.grid.visual, case.heads, case.dim).transpose(1, 2).to(case.dtype)
    maps = case.batch, case.heads, *(order.visual_blocks for order in case.orders)
    listed = torch.rand(maps) < case.listed
    listed[..., 0] |= ~listed.any(-1)
    dropped = None if case.dropped is None else torch.rand(maps) < case.dropped
    return tensors, (upstream, torch.randn(upstream.shape[:3])), listed, dropped


def lists_of(listed):
    """A map of blocks as lists in any order, with numbers behind the counts that must not be read."""
    keys = torch.where(listed, torch.rand(listed.shape), 2.0).argsort(-1)
    counts = listed.sum(-1)
    indices = torch.where(torch.arange(listed.shape[-1]) < counts[..., None], keys, 10**6)
    return BlockLists(indices.int(), counts.int())


def block_of(order):
    """The block of every visual token in raster order."""
    index = order.index()[: order.visual_blocks * order.block] - order.grid.visual_start
    blocks = torch.empty(order.grid.visual, dtype=torch.long)
    slots = (index >= 0).nonzero().squeeze(1)
    blocks[index[slots]] = slots // order.block
    return blocks


def formula(q, k, v, case, listed, dropped, dtype):
    """Output and LSE, by sums of exponentials over tokens and over pseudo-keys; magnitudes of what cancels if asked."""
    grid, (query_order, key_order) = case.grid, case.orders
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = case.dim**-0.5 if case.scale is None else case.scale
    visual = torch.arange(grid.visual_start, grid.visual_start + grid.visual)
    rows, columns = block_of(query_order), block_of(key_order)
    member = torch.nn.functional.one_hot(columns, key_order.visual_blocks).to(dtype).T  # [blocks, visual]
    sizes = member.sum(-1)
    keys, sums = (member @ k[:, :, visual]) / sizes[:, None], member @ v[:, :, visual]
    seen = torch.zeros(case.batch, case.heads, grid.visual, grid.tokens, dtype=torch.bool)
    seen[..., visual] = listed[:, :, rows][..., columns]
    around = torch.ones(case.batch, grid.tokens, dtype=torch.bool)
    around[:, visual] = False
    if case.text_lens is not None:
        place = torch.arange(grid.tokens) - grid.text_start
        around &= ~((place >= torch.tensor(case.text_lens)[:, None]) & (place < grid.text))
    seen |= around[:, None, None]
    tail = ~(listed if dropped is None else listed | dropped)[:, :, rows]
    queries = q[:, :, visual]
    values = torch.where(seen.any(-2)[..., None], v, 0)  # text that is not valid is poisoned
    logits = (queries @ torch.where(seen.any(-2)[..., None], k, 0).mT * scale).masked_fill(~seen, -torch.inf)
    pseudo = (queries @ keys.mT * scale).masked_fill(~tail, -torch.inf)
    top = torch.maximum(logits.amax(-1), pseudo.amax(-1)).detach()[..., None]
    p, p_tail = torch.exp(logits - top), torch.exp(pseudo - top)
    mass = (p_tail * sizes).sum(-1, keepdim=True)
    total = p.sum(-1, keepdim=True) + mass
    numerator = p @ values + p_tail @ sums
    if case.first_order:
        matrix = (k[:, :, visual] - keys[:, :, columns]).mT @ v[:, :, visual]
        numerator = numerator + scale * (queries @ matrix) * mass / grid.visual
    return numerator / total, (total.log() + top)[..., 0]


def magnitudes(q, k, v, case, listed, dropped, upstream):
    """What is rounded, as sums of magnitudes, by name: the terms of the gradients, and the parts of the output.

    Weights of tokens stand for those of their blocks' pseudo-keys, which are no larger: exp of a mean is at most the
    mean of exp. No part of the output is larger than the same average of |v|.
    """
    scale = case.dim**-0.5 if case.scale is None else case.scale
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = formula(q, k, v, case, listed, dropped, torch.float64)
    average, _ = formula(q, k, v.abs(), dataclasses.replace(case, first_order=False), listed, dropped, torch.float64)
    grad, grad_lse = (x.double() for x in upstream)
    queries = q[:, :, case.grid.visual_start : case.grid.visual_start + case.grid.visual]
    logits = torch.minimum(queries @ k.mT * scale, lse[..., None])
    sizes = gradient_sizes(queries, k, v, grad, out, logits, lse, scale, case.dtype, grad_lse)
    return sizes | {"out": torch.maximum(average, out.abs()), "lse": lse.abs().clamp(min=1)}


def beside(q, k, v, lists, *orders, dropped, text_lens, scale, share, impl):
    """`attend_with_tail` with attention that does not take the tail, which gives no share."""
    assert not share
    exact, lse = attend_visual(q, k, v, lists, *orders, text_lens=text_lens, scale=scale, lse=True, impl="portable")
    return *with_tail(q, k, v, exact, lse, lists, *orders, dropped=dropped, scale=scale, impl=impl), None


def check(case, gradients=True, attend=attend_with_tail):
    """Output, LSE and every gradient of a call, against fp64 and plain PyTorch in the same dtype."""
    tensors, upstream, listed, dropped = setup(case)
    padding = torch.zeros(case.batch, 1, case.grid.tokens, 1, dtype=torch.bool)
    if case.text_lens is not None:
        place = torch.arange(case.grid.tokens) - case.grid.text_start
        hidden = (place >= torch.tensor(case.text_lens)[:, None]) & (place < case.grid.text)
        padding |= hidden[:, None, :, None]

    def call(q, k, v):
        k, v = (x.masked_fill(padding, torch.nan) for x in (k, v))  # must not be read
        q, k, v = (x.to(case.device) for x in (q, k, v))
        lists = BlockLists(*(x.to(case.device) for x in lists_of(listed)[:2]))
        lens = None if case.text_lens is None else torch.tensor(case.text_lens, device=case.device)
        drop = None if dropped is None else dropped.to(case.device)
        out, lse, share = attend(
            q, k, v, lists, *case.orders, dropped=drop, text_lens=lens, scale=case.scale, share=case.first_order,
            impl=case.impl,
        )  # fmt: skip
        if case.first_order:
            out = with_first_order(out, share, q, k, v, case.orders[1], case.scale)
        return out.cpu(), lse.cpu()

    def run(function, dtype):
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in tensors]
        results = function(*leaves)
        if not gradients:
            return results
        return *results, *torch.autograd.grad(
            results, leaves, [u.to(r) for u, r in zip(upstream, results, strict=True)]
        )

    got = run(call, case.dtype)
    plain = run(lambda *x: formula(*x, case, listed, dropped, case.dtype), case.dtype)
    exact = run(lambda *x: formula(*x, case, listed, dropped, torch.float64), torch.float64)
    assert got[0].dtype == case.dtype and got[1].dtype == torch.promote_types(case.dtype, torch.float32)
    sums, parts = magnitudes(*tensors, case, listed, dropped, upstream), parts_of(case, attend)
    for name, result, simple, truth in zip(NAMES[: len(got)], got, plain, exact, strict=True):
        assert_accurate(name, result, simple.nan_to_num(0.0), truth, magnitude=parts.get(name, 1) * sums[name])


def parts_of(case, attend):
    """Roundings by name, see `PARTS`."""
    q = torch.empty(0, dtype=case.dtype, device=case.device)
    facts = Facts.of(q.device, q.dtype, case.dim, *case.orders, gradients=True, lse=True)
    if attend is not attend_with_tail or not impls.named(case.impl).takes_tail(facts):
        return PARTS
    return ONE_KERNEL | {"out": ONE_KERNEL["out"] + 0.5 * case.first_order}


def check_rows_without_keys(impl, **more):
    """A query block that sees nothing has output and share 0; one without listed blocks is all tail."""
    case = Case(**{"grid": TokenGrid(2, 9, 20), "block_q": 128, "batch": 1, "heads": 1, "impl": impl} | more)
    tensors, _, listed, dropped = setup(dataclasses.replace(case, dropped=0.0))
    listed[:, :, :2] = False
    dropped[:, :, 0] = True
    lists, drop = lists_of(listed).to(case.device), dropped.to(case.device)
    leaves = [x.to(case.device).requires_grad_() for x in tensors]
    results = attend_with_tail(*leaves, lists, *case.orders, dropped=drop, share=True, impl=impl)
    out, lse, share = (x.detach().cpu() for x in results)
    assert not out[:, :, :128].any() and bool((lse[:, :, :128] == -torch.inf).all()) and not share[:, :, :128].any()
    assert bool((share[:, :, 128:256] == 1).all()) and bool(lse[:, :, 128:].isfinite().all())
    assert bool((share[:, :, 256:] < 1).all())
    gradients = torch.autograd.grad(results[0].sum() + results[2].sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in gradients) and not gradients[0][:, :, :128].any()


def check_calls(chosen, sampled, tensors, upstream, dtype, impl="auto"):
    """Output and gradients of a call of one head, by name, against the plan's reference in fp64."""

    def results(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))

    def defined(q, k, v):
        return chosen.reference(sampled, 0, q[0, 0], k[0, 0], v[0, 0])[None, None]

    got = results(lambda *x: attention(*x, chosen, impl=impl), dtype)
    plain, exact = results(defined, dtype), results(defined, torch.float64)
    sums = sizes_of(sampled, *(x[0, 0].double() for x in (*tensors, upstream)), exact[0][0, 0], dtype)
    for name, result, simple, truth in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_accurate(name, result, simple, truth, magnitude=PARTS[name] * sums[name])


def check_error_calls(impl, frames=3):
    """`check_calls` of blocks that are chosen by the tail's error."""
    grid = TokenGrid(frames, 5, 7, **TEXT)
    q, k, v, upstream = torch.randn(4, 1, 1, grid.tokens, 16)
    chosen = plan("sparge", grid, topk=0.2, topp=0.3, block_q=16, block=16, order="tile", score="error", tail="mean")
    sampled = SampledQueries(chosen, torch.arange(grid.tokens), q, k, "portable", None, v)
    check_calls(chosen, sampled, [q, k, v], upstream, torch.float32, impl)


def sizes_of(sampled, q, k, v, grad, out, dtype):
    """As `magnitudes`, of one head [N, D] and over tokens and pseudo-keys."""
    plan, scale = sampled.plan, q.shape[-1] ** -0.5
    (keys, held), (values, _) = (pooled(x, plan.key_order, plan.block_of(plan.key_order)) for x in (k, v))
    seen = sampled.seen(0)
    tail = plan.in_tail(sampled, 0) if plan.has_tail else torch.zeros(len(q), len(keys), dtype=torch.bool)
    weights = plan.tail_weights(sampled, 0, held) if plan.has_tail else held.expand(len(q), -1)
    tail = tail & (weights > 0)
    logits = torch.cat([q @ k.T * scale, q @ keys.T * scale + weights.log()], -1)
    logits = logits.masked_fill(~torch.cat([seen, tail], -1), -torch.inf)
    every = torch.cat([k, keys]), torch.cat([v, values])
    sizes = gradient_sizes(q, *every, grad, out, logits, logits.logsumexp(-1), scale, dtype)
    block = plan.block_of(plan.key_order)
    for name in ("dk", "dv"):  # each token has its part of its block's
        of_tokens, of_blocks = sizes[name][: len(k)], sizes[name][len(k) :] / held[:, None]
        of_tokens[plan.grid.visual_rows] += of_blocks[block]
        sizes[name] = of_tokens
    return sizes | {"out": torch.maximum(logits.softmax(-1) @ every[1].abs(), out.abs())}
