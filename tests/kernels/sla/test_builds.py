"""What is compiled ahead of time is what the launcher launches."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.ahead_of_time import ARCHS
from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES
from dit_accel.kernels.sla import triton, triton_builds


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture
def launched(monkeypatch, arch):
    """Every launch of a forward and backward pass in both scopes: kernel name, launch, constants. Nothing runs."""
    found = []

    def record(kernel, programs, launch, *arguments, **constants):
        found.append((kernel.__name__, launch, constants))

    monkeypatch.setattr(triton, "_run", record)
    monkeypatch.setattr(triton, "_capability", lambda device: arch)
    for dim in (64, 128):
        q = torch.zeros(1, 1, 64 * 512, dim, dtype=torch.float16)
        table, total = torch.zeros(1, 1, dim, dim), torch.zeros(1, 1, dim)
        blocks = (1, 1, 64 * 512), 64, None
        kept, dropped = (torch.zeros(1, 1, 512, n, dtype=torch.int32) for n in (1, 2))
        triton.route(q, q, *blocks, 1, 2)
        triton.apply(q, q, table, total, None, "softmax")
        triton.apply_backward(q, q, table, total, "softmax")
        triton.state_backward(q, q, table, total, "softmax")
        _, denominators, modes = triton.marginal(q, q, q, kept, dropped, *blocks, "softmax")
        modes.zero_()
        triton.marginal_backward(q, q, q, q, kept, dropped, denominators, modes, *blocks, "softmax")
    return found


def test_every_launch_is_compiled_ahead_of_time(launched, arch):
    builds = list(triton_builds.builds(arch))
    chosen = ("D", "BLOCK_D", "BLOCK", "ROWS", "WIDTH", "SPLIT")
    compiled = {
        (
            build.function.split(":")[1],
            build.warps,
            build.stages,
            *((name, value) for name, value in build.constants if name in chosen and value),
        )
        for build in builds
    }
    kernels = {entry[0] for entry in compiled}
    assert {name for name, *_ in launched} == kernels
    for name, launch, constants in launched:
        sizes = {(key, value) for key, value in constants.items() if key in chosen}
        fits = [x for x in compiled if x[:3] == (name, launch.warps, launch.stages) and sizes <= set(x[3:])]
        assert fits, f"{name} with {launch} and {sizes} is not compiled ahead of time"
    assert all(build.needs <= SHARED_BYTES[arch] for build in builds)
