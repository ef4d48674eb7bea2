"""Limits that CI can hold."""

import math

import pytest
from messages import names, says

from dit_accel.errors import DitAccelError
from dit_accel.eval import gates


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("psnr>=25", 25.0, True),
        ("psnr>25", 25.0, False),
        ("psnr>=25", math.inf, True),
        ("fid[demo-clip] <= 1.5e1", 15.0, True),
        ("fid[demo-clip]<.5", 0.5, False),
        ("kid>-1", 0.0, True),
    ],
)
def test_one(text, value, holds):
    (limit,) = gates.parse(text)
    remarks = gates.broken([limit], {"gna": {limit.figure: value}})
    assert len(remarks) == (0 if holds else 1)
    assert all(says(remark, "gna", limit, f"{value:.4g}") for remark in remarks)


def test_several():
    limits = gates.parse("psnr>=25,speedup>=1.5")
    gates.check_names(limits, ("psnr", "speedup"))
    slow, unmeasured = gates.broken(
        limits, {"gna": {"psnr": 30.0, "speedup": 1.25}, "tile": {"psnr": None, "speedup": 2.0}}
    )
    assert says(slow, "gna speedup>=1.5 1.25") and says(unmeasured, "tile psnr>=25")


@pytest.mark.parametrize("text", ["", "psnr", "psnr=25", "psnr>=", ">=25", "psnr>=25,", "psnr>=x", "psnr>=25speedup>1"])
def test_refused(text):
    with pytest.raises(DitAccelError, match=names("--require")):
        gates.parse(text)


def test_a_bound_that_no_figure_reaches():
    with pytest.raises(DitAccelError, match=names("--require", "psnr>=1e999")):
        gates.parse("psnr>=1e999")


def test_unknown_figure():
    with pytest.raises(DitAccelError, match=names("pnsr psnr")):
        gates.check_names(gates.parse("pnsr>=25"), ("psnr", "speedup"))
