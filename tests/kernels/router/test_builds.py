"""What is compiled ahead of time of the router is what the launcher launches."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.router import triton, triton_configs
from dit_accel.kernels.router.rule import RouterArguments
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid
from tools.kernels import router as declared
from tools.kernels.ahead_of_time import ARCHS

TILES = {64: (1, 8, 8), 128: (2, 8, 8)}


@pytest.fixture
def launched(monkeypatch):
    """Launches of calls with each part of a rule and with all: kernel, constants, warps. Nothing runs."""
    launches = []

    def record(kernel, programs, warps, arguments, constants):
        names = [name for name in triton.JIT[kernel].arg_names if name not in constants]
        assert len(arguments) == len(names), f"{kernel} takes {names}"
        launches.append((kernel, constants, warps))

    monkeypatch.setattr(triton, "_run", record)
    counts, shares = torch.ones(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1)
    for dim in declared.HEAD_DIMS:
        for frames, cells in ((8, 1), (32, 4)):
            orders = [TokenOrder(TokenGrid(frames, 64, 64), block, TILES[block]) for block in (128, 64)]
            q = torch.zeros(1, 1, frames * 4096, dim, dtype=torch.float16)
            forced = torch.zeros(orders[0].blocks, orders[1].blocks, dtype=torch.bool)
            tau = 1.0 if cells == 1 else None
            for order in orders:
                triton.deviations(q, order)
            for parts in (
                (counts, shares, forced, tau, False, cells, 0.1),
                *(((counts, None, None, None, False, cells, None), (None, shares, None, None, False, cells, None))),
                *(((None, None, forced, None, False, cells, None), (None, None, None, None, False, cells, 0.1))),
            ):
                triton.route(q, q, RouterArguments(*orders, *parts, 0.1, orders[1].blocks))
            triton.route(q, q, RouterArguments(*orders, counts, None, None, None, False, cells, None, 0.1, 5, skip=2))
    return launches


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launch_is_compiled_ahead_of_time(launched, arch):
    compiled = {
        (build.function.rpartition(":")[2], frozenset(build.constants), build.warps) for build in declared.builds(arch)
    }
    assert {kernel for kernel, *_ in launched} == set(triton.JIT)
    for kernel, constants, warps in launched:
        parts = [name for name in triton_configs.PARTS if constants.get(name)]
        if 1 < len(parts) < len(triton_configs.PARTS):  # compiled: one part, or all
            continue
        entry = triton.JIT[kernel].__name__, frozenset(constants.items()), warps
        assert entry in compiled, f"{kernel} with {constants}"


def test_rows_fit_their_registers():
    for blocks in (1, 33, 512, 513, 1182, triton_configs.MAX_BLOCKS, triton_configs.MAX_COUNTED):
        width = triton_configs.width_of(blocks)
        assert blocks <= width <= max(32, 2 * blocks) and width / (32 * triton_configs.warps_of(width)) <= 16
    assert triton_configs.unsupported(128, triton_configs.MAX_BLOCKS) is None
    assert "4096 visual key blocks by this rule, not 4097" in triton_configs.unsupported(
        128, triton_configs.MAX_BLOCKS + 1
    )
    assert triton_configs.unsupported(128, triton_configs.MAX_COUNTED, by_number=True) is None
    assert "8192" in triton_configs.unsupported(128, triton_configs.MAX_COUNTED + 1, by_number=True)
