"""The operator's checks; what it computes is held in tests/methods/sla."""

import pytest
import torch
from messages import names
from sla_calls import sparse_linear_attention

from dit_accel.errors import DitAccelError


def make(tokens=100, dim=16):
    return torch.randn(3, 1, 2, tokens, dim).unbind()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"topk": -1}, "topk skip 7 -1 0"),
        ({"topk": 8}, "topk skip 7 8 0"),
        ({"topk": 4, "skip": 4}, "topk skip 7 4"),
        ({"topk": 4, "skip": -1}, "topk skip 4 -1"),
        ({"topk": 1, "weight": torch.zeros(16, 8)}, "weight [16, 16] (16, 8) None"),
        ({"topk": 1, "bias": torch.zeros(8)}, "bias [16] (16, 16) (8,)"),
        (
            {"topk": 1, "feature_map": "gelu"},
            "feature_map softmax elu relu focused hedgehog 'gelu'",
        ),
        ({"topk": 1, "linear_scope": "some"}, "linear_scope all marginal 'some'"),
        ({"topk": 1, "grid": (1, 9, 11)}, "[batch, heads, 99, head_dim]"),
        ({"topk": 1, "feature_map": "hedgehog"}, "[2, heads, 16, 16] 2 None"),
        ({"topk": 1, "impl": "triton"}, "cpu CUDA"),
        ({"topk": 1, "tile": (1, 4, 8)}, "16 (1, 4, 8)"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(DitAccelError, match=names(message)):
        sparse_linear_attention(*make(), **({"weight": torch.zeros(16, 16), "block": 16} | settings))


def test_mixed_dtypes_are_refused():
    q, k, v = make()
    with pytest.raises(DitAccelError, match=names("torch.float32, torch.bfloat16")):
        sparse_linear_attention(q, k.bfloat16(), v, torch.zeros(16, 16), topk=1)


def test_reference_refuses_what_would_not_fit_in_memory():
    q = torch.randn(1, 1, 20_001, 1)
    with pytest.raises(DitAccelError, match=names(20000, 20001, "impl='portable'")):
        sparse_linear_attention(q, q, q, torch.zeros(1, 1), topk=1, impl="reference")


def test_named_implementations_agree():
    q, k, v = (x.double() for x in make(300))
    weight = torch.randn(16, 16, dtype=torch.float64)
    arguments = {"topk": 2, "skip": 3, "block": 32, "text": 20, "linear_scope": "marginal", "weight": weight}
    results = [
        sparse_linear_attention(q, k, v, grid=(1, 14, 20), text_len=torch.tensor([7]), impl=impl, **arguments)
        for impl in ("auto", "portable", "reference")
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[1], results[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_an_empty_batch_is_empty(impl):
    q = torch.randn(0, 2, 100, 16, requires_grad=True)
    out = sparse_linear_attention(q, q, q, topk=1, block=16, weight=torch.zeros(16, 16), impl=impl)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 100, 16)
