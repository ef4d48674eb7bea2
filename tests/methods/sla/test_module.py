"""SLA as a module: under torch.compile, its output's layout, and calls that do not fit."""

import pytest
import torch
from messages import names
from sla_calls import SHORT, TEXT_FIRST, TEXT_LAST, VIDEO
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.errors import DitAccelError
from dit_accel.methods.sla import SparseLinearAttention


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
    """One graph for the first length, one for all others; more critical and negligible blocks make no new one."""
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


def test_calls_that_do_not_fit_are_refused():
    module = SparseLinearAttention(16)
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(DitAccelError, match=names("head_dim", 16, 8)):
        module(q[..., :8], q[..., :8], q[..., :8])
    with pytest.raises(DitAccelError, match=names("[batch, heads, 135, head_dim]")):
        module(q, q, q, grid=VIDEO)
    with pytest.raises(DitAccelError, match=names("q", "k", "[batch, heads, 135, head_dim]")):
        module.route(q, q, VIDEO)
    with pytest.raises(DitAccelError, match="must all be"):
        module(q, q[:, :, :10], q[:, :, :10])
    with pytest.raises(DitAccelError, match="pass grid=TokenGrid"):
        SparseLinearAttention(16, order="tile")(q, q, q)
    with pytest.raises(DitAccelError, match=names("impl", "auto, reference, portable, triton", "gluon", "'cuda'")):
        module(q, q, q, impl="cuda")
