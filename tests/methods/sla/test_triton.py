"""Whole SLA calls by the Triton kernels, on a GPU or under Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this file runs in a process of its own.
"""

import pytest
import torch
from accuracy import assert_accurate
from sla_calls import INTERPRETED, MARGINAL, SHORT, WIDE, Case, check

from dit_accel.kernels.sla import ops, triton_configs
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.order import TokenOrder
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

TINY = TokenGrid(2, 3, 7)
TINY_TEXT = TokenGrid(2, 3, 7, text=5, text_first=True, conditioning=3)
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
    "wide": Case(TokenGrid(1, 7, 15), SHORT | WIDE, dim=16, **ONE),
    "wide-tiles-text": Case(
        TokenGrid(2, 3, 15, text=5, conditioning=17),
        {**SHORT, **WIDE, "order": "tile"},
        dim=16,
        text_lens=(2, 5),
        size=4.0,
        heads=1,
        impl="triton",
    ),
    "wide-marginal-x4": Case(TokenGrid(1, 7, 15), MARGINAL | WIDE, size=4.0, dim=16, **ONE),
    "narrow-marginal-tiles": Case(
        TINY_TEXT, {**MARGINAL, "block": 32, "block_q": 16, "order": "tile"}, dim=16, text_lens=(3,), **ONE
    ),
    "fp16-wide-marginal": Case(TokenGrid(1, 7, 15), MARGINAL | WIDE, dtype=torch.float16, dim=24, **ONE),
    "fp16-marginal": Case(TINY, MARGINAL, dtype=torch.float16, dim=16, **ONE),
    "fp16-marginal-elu-x4": Case(TINY, MARGINAL | {"feature_map": "elu"}, dtype=torch.float16, size=4.0, dim=24, **ONE),
    "linear-marginal": Case(TINY, {**MARGINAL, "topk": 0.0}, dim=16, **ONE),
    "linear-text": Case(TINY_TEXT, {**SHORT, "topk": 0.0}, dim=16, text_lens=(0,), **ONE),
    "fp16-text-x4": Case(TINY_TEXT, SHORT, dtype=torch.float16, size=4.0, dim=16, text_lens=(0,), **ONE),
}


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or CUDA")
@pytest.mark.parametrize("case", TRITON_CASES.values(), ids=TRITON_CASES)
def test_triton_forward_and_gradients(case):
    check(case)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or CUDA")
@pytest.mark.parametrize("case", ["wide-marginal-x4", "wide-marginal-tiles"])
def test_query_blocks_too_large_for_the_marginal_kernels_are_halved(case, monkeypatch):
    """As for 128 queries, whose halves of 64 the kernels take; here 32 queries, and 16 at most."""
    halved = []
    for module in (ops, triton_configs):
        monkeypatch.setattr(module, "MARGINAL_BLOCK", 16)
    halve = TokenOrder.halved
    monkeypatch.setattr(TokenOrder, "halved", lambda order, device: halved.append(order) or halve(order, device))
    tiles = Case(TINY_TEXT, {**MARGINAL, **WIDE, "order": "tile"}, dim=16, text_lens=(3,), **ONE)
    check(tiles if case == "wide-marginal-tiles" else TRITON_CASES[case])
    assert [order.block for order in halved] == [32]


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or CUDA")
@pytest.mark.parametrize("scope", ["all", "marginal"])
def test_text_that_is_weighed(scope):
    """Text behind its length is a key with a bias: the exact branch is the engine's, the linear one the kernel's.

    A random gate chooses the blocks.
    """
    device = "cpu" if INTERPRETED else "cuda"
    torch.manual_seed(0)
    shape, grid = (2, 1, TINY_TEXT.tokens, 16), TINY_TEXT
    leaves = [torch.randn(shape) for _ in range(3)] + [torch.randn(16, 16) / 4, torch.randn(16)]
    bias, lens, gate = torch.randn(shape[0], shape[2]), torch.tensor([2, 5]), [torch.randn(1, 16, n) for n in (16, 48)]
    gradient = torch.randn(shape)

    def results(impl, dtype, device):
        setting = {"topk": 0.4, "skip": 0.4, "block": 16, "linear_scope": scope, "score": "learned"}
        module = SparseLinearAttention(16, **setting).to(device, dtype)
        names = ("proj.weight", "proj.bias", "gate.queries", "gate.keys")
        module.load_state_dict(dict(zip(names, [*leaves[3:], *gate], strict=True)))
        q, k, v = (x.to(dtype).to(device).requires_grad_() for x in leaves[:3])
        lengths = {"text_lens": lens.to(device), "text_bias": bias.to(device)}
        out = plan("sla", grid, **vars(module.config)).attend(q, k, v, **lengths, impl=impl, module=module)
        tensors = [q, k, v, *module.proj.parameters()]
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, tensors, gradient.to(out)))]

    got, plain = results("triton", torch.float32, device), results("reference", torch.float32, "cpu")
    exact = results("reference", torch.float64, "cpu")
    for name, *values in zip(("out", "dq", "dk", "dv", "dweight", "dbias"), got, plain, exact, strict=True):
        # the two branches are rounded once each, and so is the part of the text that is weighed
        assert_accurate(name, *values, magnitude=3 * values[-1].abs())
