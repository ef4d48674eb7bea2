"""The custom ops under opcheck and torch.compile."""

import pytest
import torch
from block_sparse_calls import block_sparse_attention
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels.block_sparse import api


@pytest.mark.parametrize("topk", [None, 2], ids=["shared", "per-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(make_problem, topk, dtype):
    method = {} if topk else {"method": "gna", "config": {"window": (1, 3, 3)}}
    problem = make_problem((2, 4, 5), text=5, text_lens=[2, 5], batch=2, topk=topk, **method)
    leaves = [x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    arguments = *problem.block_lists(), *problem.segments()
    settings = problem.geometry().pack(), problem.scale, "portable"
    torch.library.opcheck(api.attention_forward, (*leaves, *arguments, *settings))
    out, lse = api.attention_forward(*leaves, *arguments, *settings)
    leaves = [x.detach() for x in leaves]
    grad = torch.randn_like(out)
    for grad_lse in (None, torch.randn_like(lse)):
        results = grad, grad_lse, out.detach(), lse.detach()
        torch.library.opcheck(api.attention_backward, (*results, [*leaves, *arguments], *settings))


def _compiled(counter):
    def attend(q, k, v, kv_indices, kv_counts, partial, tables, text_len, options):
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            kv_indices,
            kv_counts,
            partial=partial,
            tables=tables,
            text_len=text_len,
            return_lse=True,
            **options,
        )
        return out.transpose(1, 2).flatten(2).sin(), lse

    torch._dynamo.reset()
    return attend, torch.compile(attend, fullgraph=True, backend=counter)


def _arguments(problem):
    tensors = ("partial", "tables", "text_len")
    sizes = ("grid", "block_q", "block_k", "tile_q", "tile_k", "text", "conditioning", "partial_blocks")
    optional = [problem.options.get(name) for name in tensors]
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    return leaves, (*problem.lists, *optional, {name: problem.options.get(name) for name in sizes})


def test_fullgraph_on_the_first_call_with_gradients(make_problem):
    counter = CompileCounterWithBackend("aot_eager")
    attend, compiled = _compiled(counter)
    problem = make_problem((2, 4, 5), "gna", {"window": (1, 3, 3)}, text=5, text_lens=[2])
    for _ in range(2):
        results = []
        for function in (attend, compiled):
            leaves, rest = _arguments(problem)
            out, lse = function(*leaves, *rest)
            results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_at_most_one_more_graph_when_lengths_change(make_problem):
    """Other grids, text lengths, widths of the lists, sizes of the tables and numbers of terms."""
    counter = CompileCounterWithBackend("eager")
    attend, compiled = _compiled(counter)
    cases = [
        ((2, 4, 5), "gna", {"window": (1, 3, 3)}, 5),
        ((3, 5, 7), "gna", {"window": (2, 3, 3)}, 9),
        ((4, 6, 8), "radial", {"decay": 0.3}, 12),
        ((5, 7, 9), "radial", {"decay": 0.6}, 7),
    ]
    for shape, method, config, text in cases:
        leaves, rest = _arguments(make_problem(shape, method, config, text=text, text_lens=[text - 2]))
        torch.testing.assert_close(compiled(*leaves, *rest), attend(*leaves, *rest))
    assert counter.frame_count <= 2


def test_inductor(make_problem):
    problem = make_problem((2, 4, 5), topk=2, text=5, text_lens=[2])
    attend, compiled = _compiled("inductor")
    leaves, rest = _arguments(problem)
    for got, want in zip(compiled(*leaves, *rest), attend(*leaves, *rest), strict=True):
        torch.testing.assert_close(got, want)
