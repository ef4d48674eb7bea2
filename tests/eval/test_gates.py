"""Limits that CI can hold."""

import math

import pytest

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
    remark = f"gna: {limit} was asked for, and it is {value:.4g}"
    assert gates.broken([limit], {"gna": {limit.figure: value}}) == ([] if holds else [remark])


def test_several():
    limits = gates.parse("psnr>=25,speedup>=1.5")
    gates.check_names(limits, ("psnr", "speedup"))
    found = gates.broken(limits, {"gna": {"psnr": 30.0, "speedup": 1.25}, "tile": {"psnr": None, "speedup": 2.0}})
    assert found == [
        "gna: speedup>=1.5 was asked for, and it is 1.25",
        "tile: psnr>=25 was asked for, and this run has no such figure",
    ]


@pytest.mark.parametrize("text", ["", "psnr", "psnr=25", "psnr>=", ">=25", "psnr>=25,", "psnr>=x", "psnr>=25speedup>1"])
def test_refused(text):
    with pytest.raises(DitAccelError, match="--require takes figure, sign and number"):
        gates.parse(text)


def test_a_bound_that_no_figure_reaches():
    with pytest.raises(DitAccelError, match="--require psnr>=1e999: 1e999 is not finite"):
        gates.parse("psnr>=1e999")


def test_unknown_figure():
    with pytest.raises(DitAccelError, match=r"there is no figure 'pnsr'\. Did you mean 'psnr'"):
        gates.check_names(gates.parse("pnsr>=25"), ("psnr", "speedup"))
