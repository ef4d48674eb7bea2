"""What is compiled ahead of time is what the launcher launches."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.ahead_of_time import ARCHS
from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES
from dit_accel.kernels.sla import triton, triton_builds
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.layout import Cut


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture
def launched(monkeypatch, arch):
    """Every launch of a forward and backward pass in both scopes: kernel name and constants. Nothing runs."""
    found = []

    def record(kernel, programs, arguments, constants):
        found.append((kernel, constants))

    monkeypatch.setattr(triton, "_run", record)
    monkeypatch.setattr(triton, "_capability", lambda device: arch)
    cut = Cut((1, 1, 64 * 512), 64)
    for dim in (64, 128):
        q = torch.zeros(1, 1, 64 * 512, dim, dtype=torch.float16)
        table, total = torch.zeros(1, 1, dim, dim), torch.zeros(1, 1, dim)
        lists = triton.Lists(*(torch.zeros(1, 1, 512, n, dtype=torch.int32) for n in (1, 2)))
        means = triton.block_means(q, cut)
        triton.select(means, means, 1, 2)
        triton.state(q, q, cut, "softmax")
        triton.apply(q, q, table, total, total[0, 0], "softmax")
        triton.apply_backward(q, q, table, total, "softmax")
        triton.state_backward(q, q, table, total, "softmax")
        _, denominators, modes = triton.marginal(q, q, q, (table, total), lists, cut, "softmax")
        modes.zero_()
        triton.marginal_backward(q, q, q, q, (table, total), lists, denominators, modes, cut, "softmax")
    return found


def test_every_candidate_of_every_launch_is_compiled_ahead_of_time(launched, arch):
    # only the tile is another: one stands for all
    tile = ("TILE_T", "TILE_H", "TILE_W")

    def sizes(constants):
        return frozenset((name, value) for name, value in dict(constants).items() if name not in tile)

    compiled = {
        (build.function, build.warps, build.stages, sizes(build.constants)) for build in triton_builds.builds(arch)
    }
    assert {name for name, _ in launched} == set(triton.JIT) == set(triton_builds.FUNCTIONS)
    for kernel, constants in launched:
        function = f"{triton_builds.FOLDER}.{triton_builds.FUNCTIONS[kernel]}"
        assert triton.JIT[kernel].__name__ == function.split(":")[1]
        for launch in configs.fitting(kernel, constants, 2, arch):
            entry = function, launch.warps, launch.stages, sizes({**constants, "STEP": launch.step})
            assert entry in compiled, f"{kernel} with {launch} and {constants} is not compiled ahead of time"


def test_a_candidate_is_left_for_every_build(launched, arch):
    assert all(build.needs <= SHARED_BYTES[arch] for build in triton_builds.builds(arch))
    for kernel, constants in launched:
        for itemsize in (2, 4):
            found = configs.fitting(kernel, constants, itemsize, arch)
            assert found and len(set(found)) == len(found), f"{kernel}, {itemsize} bytes: {found}"


@pytest.mark.parametrize("blocks, width", [(1, 16), (16, 16), (17, 32), (512, 512), (1182, 2048), (8192, 8192)])
def test_rows_of_scores_fit_a_program(arch, blocks, width):
    assert configs.width_of(blocks) == width
    for launch in configs.fitting("select", {"D": 64, "WIDTH": width, "HAS_SKIPPED": False}, 2, arch):
        assert launch.step * width <= 32 * 32 * launch.warps
