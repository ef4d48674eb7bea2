"""The precision that "auto" stands for, by what a device computes."""

import platform

import pytest
import torch
from accelerate.state import AcceleratorState

import dit_accel
from dit_accel.train.processes import mixed_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("features", "wanted"),
    [({"avx2": True, "avx512_bf16": False}, "no"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
    ids=["avx2", "avx512", "amx"],
)
def test_a_processor(features, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert mixed_precision("auto", CPU) == wanted


@pytest.mark.parametrize(("native", "wanted"), [(True, "bf16"), (False, "no")])
def test_a_gpu(native, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert mixed_precision("auto", GPU) == wanted


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_named_one_stays(precision):
    assert {mixed_precision(precision, device) for device in (CPU, GPU)} == {precision}


def test_this_processor_is_known():
    """The names of its features are those of PyTorch: a renamed one would make every processor slow."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("names of x86")
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


def test_a_run_records_what_it_took(trained, monkeypatch):
    """So that it does not go on in another precision on another machine without a word."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    trained(steps=1, precision="auto")
    AcceleratorState._reset_state()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with pytest.raises(dit_accel.DitAccelError, match="precision"):
        trained(steps=2, precision="auto")
