"""A launch runs an earlier one's binary only where that is its own: compiled for a GPU that is not here, never run."""

import contextlib
import os
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import dit_accel
from dit_accel.kernels import impls, obstacles, tuning
from dit_accel.kernels.block_sparse import triton as block_sparse
from dit_accel.kernels.block_sparse import triton_lists
from dit_accel.kernels.block_sparse.geometry import BlockSparseInputs, Segments
from dit_accel.kernels.block_sparse.triton_configs import Launch
from dit_accel.kernels.jit import kernel

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
    monkeypatch.setattr(block_sparse, "_PLAN_LAUNCHES", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return HERE


@kernel
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
    arguments = {"x": torch.zeros(64)}
    start(**arguments)
    start(**arguments | other)
    start(**arguments)
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
    monkeypatch.setattr(obstacles, "INTERPRETED", True)  # tensors on a CPU are taken
    monkeypatch.setattr(block_sparse, "_candidates", lambda *sizes: (Launch(4, 1, 32),))
    q, k, v = (torch.zeros(2, grid.tokens, 1, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    plan.prepare(q.device, q.dtype, 64, "triton")
    lists = plan.lists(q.device, impls.named("triton").packing)
    segments = Segments(text_len=None if lengths is None else torch.tensor(lengths, dtype=torch.int32))
    with Operations() as seen:
        block_sparse.forward(BlockSparseInputs(q, k, v, lists, segments, plan.geometry, 0.125))
    assert set(seen.names) == {"aten::as_strided", "aten::new_empty", "aten::transpose.int"}
    assert seen.names.count("aten::new_empty") == 3
    assert len(device.launched) == 2


@pytest.fixture
def static(device, monkeypatch):
    """A plan that the Triton kernels run, and q, k and v for it."""
    grid = dit_accel.TokenGrid(2, 9, 10, text=5)
    plan = dit_accel.plan("gna", grid, window=(2, 5, 5))
    monkeypatch.setattr(obstacles, "INTERPRETED", True)  # tensors on a CPU are taken
    monkeypatch.setattr(block_sparse, "_candidates", lambda *sizes: (Launch(4, 1, 32),))
    plan.prepare(torch.device("cpu"), torch.float16, 64, "triton")
    return plan, [torch.zeros(2, grid.tokens, 2, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3)]


def told(launched):
    """What a launch tells the device: the binary, programs and arguments; of a tensor all but its place."""
    binary, _, programs, arguments = launched
    return binary, programs, [described(x) for x in arguments]


def described(x, tensor=lambda x: (x.dtype, x.shape, x.stride())):
    """An argument, also a record, with what is said of tensors in their place."""
    if isinstance(x, tuple):
        return tuple(described(member, tensor) for member in x)
    if isinstance(x, torch.Tensor):
        return tensor(x)
    return {**vars(x), "base": tensor(x.base)} if hasattr(x, "base") else x


@pytest.mark.parametrize("lengths", [None, (3, 5)])
def test_a_call_like_an_earlier_one_repeats_its_launches(static, device, lengths):
    plan, (q, k, v) = static
    lens = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    apart = torch.zeros(2, 3, *q.shape[1:], dtype=q.dtype)[:, 0]  # other strides
    for x in (q, apart, q, apart):
        plan.attend(x, k, v, text_lens=lens, impl="triton")
    first, other, again, as_other = (list(map(told, device.launched[at : at + 2])) for at in range(0, 8, 2))
    assert first == again != other == as_other
    assert len(block_sparse._PLAN_LAUNCHES) == 2
    *_, (_, _, _, arguments) = device.launched
    assert [x.start.data_ptr() for x in arguments[1:4]] == [x.data_ptr() for x in (apart, k, v)]


def test_a_repeated_gluon_call_differs_in_its_results_alone(device, monkeypatch):
    gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.launches")
    seen = []

    class Binary:
        def __getitem__(self, programs):
            return lambda *values: seen.append((programs, values))

    def launch(kernel, programs, arguments, constants, *rest):
        Binary()[programs](*arguments, *constants.values())
        return tuning.PastLaunch(Binary(), programs, (*arguments, *constants.values()))

    monkeypatch.setattr(tuning, "launch", launch)
    monkeypatch.setattr(gluon, "_PLAN_LAUNCHES", {})
    grid = dit_accel.TokenGrid(2, 16, 16, text=70)
    plan = dit_accel.plan("gna", grid, window=(2, 5, 5))
    lists = plan.lists(torch.device("cpu"), impls.named("gluon").packing)
    views = triton_lists.opened(lists, plan.geometry)
    q, k, v = (torch.zeros(1, grid.tokens, 2, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    for given in (lists, views, views, views):
        out, lse = gluon.forward(BlockSparseInputs(q, k, v, given, Segments(), plan.geometry, 0.125))
        assert (out.shape, out.stride(), lse.shape, lse.dtype) == (q.shape, q.stride(), q.shape[:3], torch.float32)

    def tensor(x):
        return x.data_ptr() if any(x.data_ptr() == y.data_ptr() for y in (q, k, v)) else (x.dtype, x.shape[:1])

    calls = [
        [(programs, [described(x, tensor) for x in values]) for programs, values in seen[at : at + 2]]
        for at in range(0, 8, 2)
    ]
    assert calls[0] == calls[1] == calls[2] == calls[3] and len(seen) == 8
    assert len(gluon._PLAN_LAUNCHES) == 1


def test_a_repeated_call_does_little_on_the_host(static):
    """Results and words are its only new tensors. The bounds are those of the present code, and time is no part."""
    plan, tensors = static
    for _ in range(2):
        plan.attend(*tensors, impl="triton")
    calls, made = [], []

    def note(frame, event, what):
        if event == "call" and "dit_accel" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)
        elif event == "c_call":
            made.append(what.__name__)

    sys.setprofile(note)
    try:
        plan.attend(*tensors, impl="triton")
    finally:
        sys.setprofile(None)
    assert made.count("new_empty") == 3
    assert not {"empty", "zeros", "arange", "as_strided", "fill_", "to", "tensor", "clone"} & set(made)
    assert len(calls) <= 30 and len(made) <= 100, (len(calls), len(made))
