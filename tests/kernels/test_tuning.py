"""A launch runs an earlier one's binary only where that is its own: compiled for a GPU that is not here, never run."""

import contextlib
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import dit_accel
from dit_accel.kernels import impls, tuning
from dit_accel.kernels.block_sparse import triton as block_sparse
from dit_accel.kernels.block_sparse.triton_configs import Launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces what would be compiled"
)


class Driver:
    """A device of compute capability 9.0 that notes launches and runs none."""

    def __init__(self):
        self.launched, self.utils = [], self

    def load_binary(self, name, *rest):
        return 1, name, 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def launcher_cls(self, src, metadata):
        return lambda *arguments: self.launched.append((src.hash(), metadata, arguments[:3], arguments[9:]))

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


HERE = Driver()  # one for all tests: Triton keeps binaries that call it


@pytest.fixture
def device(monkeypatch):
    HERE.launched.clear()
    monkeypatch.setattr(driver, "_active", HERE)
    monkeypatch.setattr(tuning, "_launched", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return HERE


@triton.jit(do_not_specialize=["count"])
def add_kernel(x, out, count, weight, SIZE: tl.constexpr, STEP: tl.constexpr):
    slots = tl.program_id(0) * STEP + tl.arange(0, STEP)
    tl.store(out + slots, tl.load(x + slots, mask=slots < count) + weight, mask=slots < SIZE)


def start(x, count=7, size=64, step=16):
    tuning.launch(
        add_kernel, lambda meta: (triton.cdiv(size, meta["STEP"]),), (x, x, count, 0.5), {"SIZE": size},
        (Launch(1, 1, step),), (),
    )  # fmt: skip


def test_a_launch_like_an_earlier_one_runs_its_binary(device):
    x = torch.zeros(64)
    for count in (7, 1, 16):
        start(x, count)
    first, again, last = device.launched
    assert first[0] == again[0] == last[0]
    assert first[2] == again[2] == last[2] == (4, 1, 1)
    assert [launched[3][2:] for launched in device.launched] == [(count, 0.5, 64, 16) for count in (7, 1, 16)]
    assert len(tuning._launched) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"x": torch.zeros(65)[1:]}, id="alignment"),
        pytest.param({"x": torch.zeros(64, dtype=torch.float16)}, id="dtype"),
        pytest.param({"count": 2**31}, id="width of an integer"),
        pytest.param({"size": 32}, id="constant"),
    ],
)
def test_another_launch_has_a_binary_of_its_own(device, other):
    given = {"x": torch.zeros(64)}
    start(**given)
    start(**given | other)
    start(**given)
    binaries = [launched[0] for launched in device.launched]
    assert binaries[0] == binaries[2] != binaries[1]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("lengths", [None, (3, 5)])
def test_a_call_of_a_static_plan_fills_nothing(device, monkeypatch, text_first, lengths):
    """Its tensors are the results and the words; everything else it takes as it is."""
    grid = dit_accel.TokenGrid(2, 9, 10, text=5, text_first=text_first)
    plan = dit_accel.plan("gna", grid, window=(2, 5, 5))
    monkeypatch.setattr(impls, "_triton_device", lambda facts: None)
    monkeypatch.setattr(block_sparse, "_candidates", lambda *sizes: (Launch(4, 1, 32),))
    q, k, v = (torch.zeros(2, grid.tokens, 1, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    plan.prepare(q.device, q.dtype, 64, "triton")
    lists = plan.lists(q.device, impls.named("triton").packing)
    segments = block_sparse.Segments(text_len=None if lengths is None else torch.tensor(lengths, dtype=torch.int32))
    with Operations() as seen:
        block_sparse.forward(q, k, v, lists, segments, plan.geometry, 0.125)
    assert set(seen.names) == {"aten::as_strided", "aten::new_empty", "aten::transpose.int"}
    assert seen.names.count("aten::new_empty") == 3
    assert len(device.launched) == 2
