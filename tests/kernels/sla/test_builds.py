"""What is compiled ahead of time is what the launcher launches."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.geometry import Geometry
from dit_accel.kernels.block_sparse.triton_configs import SHARED_BYTES
from dit_accel.kernels.sla import triton
from dit_accel.kernels.sla import triton_configs as configs
from dit_accel.kernels.sla.arguments import LINEAR_SCOPES
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid
from tools.kernels import sla as declared
from tools.kernels.ahead_of_time import ARCHS


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture
def launched(monkeypatch, arch):
    """Every launch of a forward and backward pass in both scopes: kernel name and constants. Nothing runs."""
    launches = []

    def record(kernel, programs, arguments, constants):
        launches.append((kernel, constants))

    def place_lists(indices, counts, order, dense):
        *rows, width = indices.shape
        return indices.new_empty(*rows, width + dense), indices.new_empty(*rows, 5)

    monkeypatch.setattr(triton, "_run", record)
    monkeypatch.setattr(tuning, "launch", lambda *launch: None)  # of the lists, which another declaration compiles
    monkeypatch.setattr(triton, "place_lists", place_lists)  # the engine's; its builds are the engine's too
    monkeypatch.setattr(triton, "_capability", lambda device: arch)
    for (block_q, block), dim in itertools.product(((64, 64), (128, 64), (128, 128)), (64, 128)):
        tokens = block * 512
        orders = (TokenOrder(TokenGrid(1, 1, tokens), size) for size in (block_q, block))
        geometry = dataclasses.replace(Geometry.of(*orders), own_queries=True)
        q = torch.zeros(1, 1, tokens, dim, dtype=torch.float16)
        lists = (torch.zeros(1, 1, tokens // block_q, n, dtype=torch.int32) for n in (1, 2))
        *whole, _ = triton.state(q, q, geometry.key_order, "softmax")
        tensors = *whole, *lists, torch.zeros(dim, dim), torch.zeros(1, dtype=torch.int32)
        for scope in LINEAR_SCOPES if max(block_q, block) <= configs.MARGINAL_BLOCK else ("all",):
            call = triton.FusedArguments(geometry, 0.125, "softmax", scope, *tensors)
            _, *saved = triton.forward(q, q, q, torch.zeros(dim), call, True)
            saved[-1].zero_()  # modes, which are read
            triton.backward(q, q, q, q, saved, call)
    return launches


def test_every_candidate_of_every_launch_is_compiled_ahead_of_time(launched, arch):
    # only the tile is another: one stands for all
    tile = ("TILE", "TILE_Q", "TILE_K")

    def sizes(constants):
        return frozenset((name, value) for name, value in dict(constants).items() if name not in tile)

    compiled = {(build.function, build.warps, build.stages, sizes(build.constants)) for build in declared.builds(arch)}
    assert {name for name, _ in launched} == set(triton.JIT) == set(declared.FUNCTIONS)
    for kernel, constants in launched:
        function = f"{declared.FOLDER}.{declared.FUNCTIONS[kernel]}"
        assert triton.JIT[kernel].__name__ == function.split(":")[1]
        for launch in configs.fitting(kernel, constants, 2, arch):
            entry = function, launch.warps, launch.stages, sizes({**constants, "STEP": launch.step})
            assert entry in compiled, f"{kernel} with {launch} and {constants} is not compiled ahead of time"


def test_a_candidate_is_left_for_every_build(launched, arch):
    assert all(build.needs <= SHARED_BYTES[arch] for build in declared.builds(arch))
    for kernel, constants in launched:
        # 128 rows in fp32 do not fit all
        wide = max(constants.get(name, 64) for name in ("BLOCK", "BLOCK_Q", "BLOCK_K")) > 64
        for itemsize in (2,) if wide else (2, 4):
            candidates = configs.fitting(kernel, constants, itemsize, arch)
            assert candidates and len(set(candidates)) == len(candidates), f"{kernel}, {itemsize} bytes: {candidates}"
