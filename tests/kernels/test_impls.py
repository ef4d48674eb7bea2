"""Which implementation a call gets, and how one is added from outside."""

import dataclasses
import sys

import pytest
import torch
from messages import names, says

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls
from dit_accel.kernels.impls import Facts, choose

CPU, CUDA = (Facts(torch.device(device), torch.float16, 64, 128, 64) for device in ("cpu", "cuda"))


@pytest.fixture
def table(monkeypatch):
    """The known implementations, to be changed by a test."""
    monkeypatch.setattr(impls, "_TABLE", dict(impls._TABLE))
    return impls._TABLE


def chooses(name, words, facts, impl="auto", kernel=impls.BLOCK_SPARSE):
    """Whether the implementation of that name is chosen, for a reason that names these words."""
    row, why = choose(facts, impl, kernel)
    return row.name == name and says(why, words)


def test_choice_names_its_reason(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chooses("portable", "first cpu", CPU)
    assert chooses("reference", "impl='reference'", CUDA, "reference")
    assert chooses("triton", f"9.0 {CUDA.device}", CUDA)
    refused = dataclasses.replace(CUDA, block_q=24)
    assert chooses("portable", "query blocks 16 32 64 128 24", refused)
    with pytest.raises(DitAccelError, match=names("impl='triton'", 24)):
        choose(refused, "triton")
    linear = dataclasses.replace(CUDA, linear_scope="all", feature_map="hedgehog")
    assert chooses("portable", "hedgehog softmax elu relu", linear, kernel=impls.SLA)
    key = impls.BLOCK_SPARSE, "triton"
    table[key] = dataclasses.replace(table[key], package="no_such_package")
    assert chooses("portable", "no_such_package", CUDA)
    with pytest.raises(DitAccelError, match=names("impl='triton'", "no_such_package", "pip install")):
        choose(CUDA, "triton")


@pytest.mark.parametrize("row", impls.ROWS, ids=lambda row: f"{row.kernel}-{row.name}")
def test_every_row_has_its_module(row):
    if not row.installed:
        pytest.skip(f"{row.package} is not installed")
    module = row.load()
    if row.kernel == impls.BLOCK_SPARSE:
        assert hasattr(module, "forward") and (row.autograd or hasattr(row.load_gradients(), "backward"))


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_auto_always_finds_one(device):
    """Whatever the dtype, head dimension and blocks."""
    for dtype in (torch.float64, torch.bfloat16):
        facts = Facts(torch.device(device), dtype, 1000, 7, 9, gradients=True, lse=True)
        assert choose(facts)[0].name == "portable"


OUTSIDE = '''
"""Every query gets the mean of its listed keys' values, by the reference."""

from dit_accel.kernels import impls
from dit_accel.kernels.block_sparse import reference


def forward(call):
    return reference.forward(call._replace(q=call.q * 0))


ROW = impls.Implementation("mean", impls.BLOCK_SPARSE, __name__, rank={"cpu": 99}, autograd=True)
impls.add(ROW)
'''


def test_an_implementation_is_added_by_one_file(table, tmp_path, monkeypatch):
    (tmp_path / "outside_mean.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("outside_mean")
    try:
        plan = dit_accel.plan("gna", dit_accel.TokenGrid(1, 4, 8), window=(1, "full", "full"))
        q = torch.randn(1, 2, 32, 16, requires_grad=True)
        for impl in ("mean", "auto"):
            out = dit_accel.attention(q, q, q, plan, impl=impl)
            torch.testing.assert_close(out, q.mean(2, keepdim=True).expand_as(q))
        assert plan.prepare(q.device, q.dtype, 16)[0] == "mean"
        (gradient,) = torch.autograd.grad(out.sum(), q)
        torch.testing.assert_close(gradient, torch.ones_like(q))
        with pytest.raises(DitAccelError, match=names("'mean'")):
            impls.add(module.ROW)
    finally:
        sys.modules.pop("outside_mean")
