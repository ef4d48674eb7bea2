"""What reaches cuDNN's block-sparse attention, by a stand-in that holds callers to its page and computes that.

Source: NVIDIA's page "Block Sparse Attention (BSA)" and the checks of nvidia-cudnn-frontend 1.32.
"""

import dataclasses
import sys
import types

import pytest
import torch
from accuracy import plain_attention
from messages import names, says

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls, obstacles

# Blocks of 64 and 128, tiles with padding slots, raster order with a ragged end and without one, text first, behind
# and between with lengths, no valid text at all, conditioning, lists by head, rows of no segment.
CASES = {
    "rows are slots": {"shape": (2, 8, 16), "topk": 2},
    "ragged": {"shape": (1, 9, 29), "topk": 3, "batch": 2},
    "tiles": {"shape": (3, 7, 9), "topk": 4, "tile_q": (2, 4, 8), "tile_k": (4, 4, 4)},
    "text first": {"shape": (3, 7, 9), "topk": 4, "text": 9, "text_first": True, "text_lens": [0, 5], "batch": 2},
    "between": {
        "shape": (2, 9, 9),
        "topk": 5,
        "text": 70,
        "conditioning": 3,
        "between": True,
        "per_sample": True,
        "gap": 2,
        "text_lens": [0, 66],
        "batch": 2,
    },
    "large blocks": {"shape": (1, 16, 19), "topk": 2, "block_q": 128, "block_k": 128},
}


class BSA:
    """The library's two functions; NaN where it does not promise to read nothing."""

    @staticmethod
    def mask(q, k, index, nums, sizes, block):
        """The pairs of a call that keeps to the page: bool [B, H, Nq, Nk]."""
        batch, heads, rows, keys = *q.shape[:3], k.shape[2]
        assert all(x.is_contiguous() or x.stride(-1) == 1 for x in (q, k))
        assert rows % 64 == 0 and index.shape[:3] == nums.shape == (batch, heads, -(-rows // block))
        assert index.dtype == nums.dtype == sizes.dtype == torch.int32
        assert sizes.shape == (batch, -(-keys // block))
        mask = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
        for b, h, m in torch.cartesian_prod(*map(torch.arange, nums.shape)).tolist():
            listed = index[b, h, m, : nums[b, h, m]].tolist()
            assert len(set(listed)) == len(listed)
            for n in listed:
                assert 1 <= sizes[b, n] <= block
                mask[b, h, m * block : (m + 1) * block, n * block : n * block + sizes[b, n]] = True
        return mask

    @classmethod
    def block_sparse_attention_forward(
        cls, q, k, v, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size, softmax_scale,
        allow_empty_block_nums,
    ):  # fmt: skip
        assert allow_empty_block_nums
        mask = cls.mask(q, k, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size)
        return plain_attention(q, k, v, mask, softmax_scale)

    @classmethod
    def block_sparse_attention_backward(
        cls, grad_out, q, k, v, out, lse, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size, softmax_scale
    ):  # fmt: skip
        mask = cls.mask(q, k, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size)
        assert grad_out.shape == out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        logits = (q @ k.mT * softmax_scale).masked_fill(~mask, -torch.inf)
        p = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        ds = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * softmax_scale
        return ds @ k, ds.mT @ q, p.mT @ grad_out


@pytest.fixture
def stand_in(monkeypatch):
    key = impls.BLOCK_SPARSE, "cudnn"
    row = dataclasses.replace(impls._TABLE[key], cannot=obstacles.nothing, package=None, dtypes=(torch.float32,))
    monkeypatch.setattr(impls, "_TABLE", {**impls._TABLE, key: row})
    monkeypatch.setitem(sys.modules, "cudnn", types.SimpleNamespace(BSA=BSA))


@pytest.mark.parametrize("case", CASES)
def test_lists_sizes_and_rows(make_problem, stand_in, case):
    problem = make_problem(**{"block_q": 64, "block_k": 64, "dim": 64} | CASES[case])
    problem.check("cudnn", torch.float32, lse_gradient=False)


def test_poison_is_never_read(make_problem, stand_in):
    problem = make_problem(**{"block_q": 64, "block_k": 64, "dim": 64} | CASES["between"])
    clean = problem.run("cudnn", torch.float32, lse_gradient=False)
    seen = problem.mask().any(-2).any(1)
    for tensor in (problem.k, problem.v):
        tensor.masked_fill_(~seen[:, None, :, None], float("nan"))
    poisoned = problem.run("cudnn", torch.float32, lse_gradient=False)
    for name, result in clean.items():
        assert torch.equal(result, poisoned[name]), name


def test_a_mask_that_cuts_blocks_is_refused(make_problem, stand_in):
    problem = make_problem((2, 8, 16), "gna", {"window": (2, 3, 3)}, block_q=64, block_k=64, dim=64)
    with pytest.raises(DitAccelError, match=names("cudnn", "blocks", "mask")):
        problem.call("cudnn")


def test_a_gradient_through_the_lse_is_refused(make_problem, stand_in):
    problem = make_problem((2, 8, 16), topk=2, block_q=64, block_k=64, dim=64)
    with pytest.raises(DitAccelError, match=names("gradient", "log-sum-exp")):
        problem.run("cudnn", torch.float32)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    key = impls.BLOCK_SPARSE, "cudnn"
    absent = dataclasses.replace(impls._TABLE[key], package="absent_package")
    monkeypatch.setattr(impls, "_TABLE", {**impls._TABLE, key: absent})
    plan = dit_accel.plan("gna", dit_accel.TokenGrid(1, 8, 8), window=(1, 3, 3))
    q = torch.zeros(1, 1, 64, 64)
    with pytest.raises(DitAccelError, match="pip install nvidia-cudnn-frontend"):
        dit_accel.attention(q, q, q, plan, impl="cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 128}, "128x64 64"),
        ({"head_dim": 80}, "64x64 80"),
        ({"gradients": True}, "gradients bfloat16 128"),
        ({}, "compute capability 9.0"),
    ],
)
def test_what_the_library_lacks_is_refused(change, message):
    facts = impls.Facts(torch.device("cpu"), torch.bfloat16, 64, 64, 64)
    assert says(str(obstacles.cudnn(dataclasses.replace(facts, **change))), message)
