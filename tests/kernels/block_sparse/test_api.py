"""The public door: layouts, errors, the choice of the implementation, autocast."""

import pytest
import torch
from block_sparse_calls import block_sparse_attention
from messages import names

import dit_accel

IMPLS = ["reference", "portable"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("topk", [None, 2], ids=["shared", "per-head"])
def test_output_and_gradients_lie_in_memory_as_the_model_wants(make_problem, impl, topk):
    problem = make_problem((2, 4, 5), topk=topk, heads=3)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = block_sparse_attention(*leaves, *problem.lists, impl=impl, **problem.options)
    assert out.transpose(1, 2).is_contiguous() and out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    if impl == "portable":
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("topk", [None, 2], ids=["shared", "per-head"])
def test_any_strides_give_the_same_bits(make_problem, impl, topk):
    problem = make_problem((2, 4, 5), topk=topk, heads=3, batch=2)
    want = problem.call(impl)
    packed = torch.stack([x.transpose(1, 2) for x in (problem.q, problem.k, problem.v)], 2)  # [B, N, 3, H, D]
    problem.q, problem.k, problem.v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    assert not problem.q.is_contiguous()
    assert torch.equal(problem.call(impl), want)
    problem.v = torch.stack([problem.v, problem.v], -1)[..., 0]  # rows that are not contiguous
    assert torch.equal(problem.call(impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_dtype(make_problem, impl):
    problem = make_problem()
    for dtype, want in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        out, lse = problem.call(impl, dtype, return_lse=True)
        assert out.dtype == dtype and lse.dtype == want and lse.shape == out.shape[:3]


def test_autocast_casts_as_sdpa_does(make_problem):
    problem = make_problem()
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.call("portable")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, problem.call("portable", torch.bfloat16))


def _int(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl auto reference portable triton 'fast'"),
        ({"q": torch.zeros(1, 2, 40)}, "q (1, 2, 40)"),
        ({"q": torch.zeros(1, 2, 40, 8)}, "B, H D"),
        ({"k": torch.zeros(1, 2, 40, 16).bfloat16()}, "dtype torch.bfloat16"),
        ({"q": torch.zeros(1, 2, 40, 16).int()}, "float16 float32 float64 torch.int32"),
        ({"grid": (2, 4)}, "grid frames rows columns"),
        ({"grid": (2, 4, 0)}, "width 1 0"),
        ({"grid": (2, 4, 6)}, "q 48 40"),
        ({"text": 3}, "q 43 40"),
        ({"text": -1}, "text -1"),
        ({"block_q": 0}, "block=0"),
        ({"tile_q": (1, 4, 5)}, "16 (1, 4, 5)"),
        ({"text_start": None}, "text_start"),
        ({"text_len": _int(0, 0)}, "text_len int32 [1]"),
        ({"visual_start": torch.zeros(1)}, "visual_start int32"),
        ({"visual_start": _int(1)}, "segments"),
        ({"text_len": _int(1)}, "text_len text=0 1"),
        (
            {"kv_indices": torch.zeros(2, 3, dtype=torch.int32)},
            "kv_indices [3, width] [1, 2, 3, width]",
        ),
        ({"kv_indices": torch.zeros(3, 3)}, "int32 torch.float32"),
        ({"kv_counts": _int(1, 1)}, "kv_counts [3]"),
        ({"kv_counts": _int(1, 4, 1)}, "kv_counts kv_indices 3 1 4"),
        ({"kv_indices": torch.full((3, 3), 3, dtype=torch.int32)}, "key blocks 0 2 3"),
        ({"partial": torch.ones(3, 3, dtype=torch.bool)}, "partial tables None"),
        ({"partial": torch.ones(3, 3), "tables": _int(0)}, "partial bool"),
        ({"tables": torch.zeros(1)}, "tables int32"),
    ],
)
def test_errors_say_what_was_wanted_and_what_came(make_problem, change, message):
    problem = make_problem((2, 4, 5))
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v}
    tensors |= dict(zip(("kv_indices", "kv_counts"), problem.lists, strict=True))
    with pytest.raises(dit_accel.DitAccelError, match=names(message)):
        block_sparse_attention(**(tensors | problem.options | {"impl": "portable"} | change))


@pytest.mark.parametrize("impl", IMPLS)
def test_text_behind_its_length_may_be_biased_instead_of_left_out(impl):
    """Output and LSE are those of dense attention with a bias, in fp64; without starts, [visual | text]."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    lens, bias = torch.tensor([4, 1], dtype=torch.int32), torch.randn(2, 9, dtype=torch.float64)
    lists, counts = torch.arange(4, dtype=torch.int32).repeat(3, 1), torch.full((3,), 4, dtype=torch.int32)
    sizes = {"block_q": 4, "block_k": 3, "grid": (1, 1, 5), "text": 4, "return_lse": True, "impl": impl}
    out, lse = block_sparse_attention(q, k, v, lists, counts, text_len=lens, text_bias=bias, **sizes)
    behind = torch.arange(9) >= 5 + lens[:, None, None, None]
    logits = q @ k.mT * 8**-0.5 + behind * bias[:, None, :, None]
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    with pytest.raises(dit_accel.DitAccelError, match=names("text_bias", "[2, 9]", "text_len")):
        block_sparse_attention(q, k, v, lists, counts, text_bias=bias, **sizes)
