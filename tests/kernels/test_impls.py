"""Which implementation a call gets, and how one is added from outside."""

import dataclasses
import sys

import pytest
import torch
from messages import names

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


def chosen(facts, impl="auto"):
    row, why = choose(facts, impl)
    return row.name, why


def test_choice_names_its_reason(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(CPU) == ("portable", "the fastest on cpu")
    assert chosen(CUDA, "reference") == ("reference", "impl='reference' was asked for")
    assert chosen(CUDA) == (
        "triton",
        f"the kernel needs a GPU of compute capability 9.0, and the tensors are on {CUDA.device}",
    )
    refused = dataclasses.replace(CUDA, block_q=24)
    assert chosen(refused) == ("portable", "the kernels take query blocks of 16, 32, 64 or 128 tokens, not 24")
    with pytest.raises(DitAccelError, match=names("impl='triton'", 24)):
        chosen(refused, "triton")
    linear = dataclasses.replace(CUDA, linear_scope="all", feature_map="hedgehog")
    why = (
        "the kernels do not compute the feature map hedgehog, which has 2 D features a token; softmax, elu and relu "
        "have kernels"
    )
    row, said = choose(linear, kernel=impls.SLA)
    assert (row.name, said) == ("portable", why)
    key = impls.BLOCK_SPARSE, "triton"
    table[key] = dataclasses.replace(table[key], package="no_such_package")
    assert chosen(CUDA) == ("portable", "the package no_such_package is not installed")
    with pytest.raises(DitAccelError, match=names("impl='triton'", "no_such_package", "pip install")):
        chosen(CUDA, "triton")


@pytest.mark.parametrize("row", impls.ROWS, ids=lambda row: f"{row.kernel}-{row.name}")
def test_every_row_has_its_module(row):
    if not row.installed:
        pytest.skip(f"{row.package} is not installed")
    functions = ("forward",) if row.autograd else ("forward", "backward")
    module = row.load()
    if row.kernel == impls.BLOCK_SPARSE:
        assert all(hasattr(module, name) for name in functions)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_auto_always_finds_one(device):
    """Whatever the dtype, head dimension and blocks."""
    for dtype in (torch.float64, torch.bfloat16):
        facts = Facts(torch.device(device), dtype, 1000, 7, 9, gradients=True, lse=True)
        assert chosen(facts)[0] == "portable"


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
        assert plan.prepare(q.device, q.dtype, 16) == ("mean", "the fastest on cpu")
        (gradient,) = torch.autograd.grad(out.sum(), q)
        torch.testing.assert_close(gradient, torch.ones_like(q))
        with pytest.raises(DitAccelError, match=names("'mean'")):
            impls.add(module.ROW)
    finally:
        sys.modules.pop("outside_mean")
