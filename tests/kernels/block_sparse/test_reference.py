"""The reference defines right, so it is held against SDPA with a mask made by other code."""

import pytest
import torch
from block_sparse_calls import block_sparse_attention
from messages import names
from torch.nn.functional import scaled_dot_product_attention

import dit_accel

METHODS = [
    ("gna", {"window": (2, 3, 4), "stride": 1}),
    ("gna", {"window": (2, 4, 4), "stride": (2, 4, 2), "causal": (True, False, False)}),
    ("gna", {"window": (2, 3, 2), "dilation": (1, 2, 3)}),
    ("tile", {"references": 1}),
    ("radial", {"decay": 0.5}),
]


@pytest.mark.parametrize("tiles", [None, ((1, 4, 4), (2, 2, 2))], ids=["raster", "tiled"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("method", "config"), METHODS)
def test_equals_sdpa_with_the_plans_token_mask(make_problem, method, config, text_first, tiles):
    blocks = {"block_q": 16, "block_k": 8} | (dict(zip(("tile_q", "tile_k"), tiles, strict=True)) if tiles else {})
    problem = make_problem((4, 6, 7), method, config, text=9, text_first=text_first, **blocks)
    grid = dit_accel.TokenGrid(4, 6, 7, text=9, text_first=text_first)
    mask = dit_accel.plan(method, grid, **config).token_mask()
    got = problem.call("reference", torch.float64)
    want = scaled_dot_product_attention(*(x.double() for x in (problem.q, problem.k, problem.v)), attn_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_gradients_and_lse(make_problem):
    problem = make_problem((2, 2, 4), "gna", {"window": (1, 2, 3)}, text=3, text_lens=[2], heads=1, dim=2)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, *problem.lists, impl="reference", return_lse=True, **problem.options)

    leaves = tuple(x.double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    assert torch.autograd.gradcheck(attend, leaves)
    logits = (leaves[0] @ leaves[1].mT * problem.scale).masked_fill(~problem.mask(), float("-inf"))
    torch.testing.assert_close(attend(*leaves)[1], logits.logsumexp(-1))


def test_refuses_long_sequences():
    q = torch.empty(1, 1, 20_001, 1)
    lists = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(dit_accel.DitAccelError, match=names(20000, 20001)):
        block_sparse_attention(q, q, q, *lists, block_q=20_001, block_k=20_001, grid=(1, 1, 20_001), impl="reference")
