"""What is compiled ahead of time of the tail is what the launcher launches."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.block_sparse import triton as engine
from dit_accel.kernels.block_sparse.api import visual_call
from dit_accel.kernels.block_sparse.geometry import BlockLists, BlockSparseInputs
from dit_accel.kernels.block_sparse.triton_configs import fitting
from dit_accel.kernels.tail import triton
from dit_accel.kernels.tail.reference import TailedInputs
from dit_accel.order import TokenOrder
from dit_accel.tokens import TokenGrid
from tools.kernels import tail as declared
from tools.kernels.ahead_of_time import ARCHS
from tools.kernels.block_sparse import BLOCKS, HEAD_DIMS, TILES


@pytest.fixture
def launched(monkeypatch):
    """Every launch of a forward and a backward pass: kernel, constants. Nothing runs."""
    launches = []

    def note(kernel, _, __, constants, *rest):
        if kernel in triton.JIT or kernel.__name__ in ("outside_kernel", "pseudo_keys_kernel"):
            launches.append((kernel, constants))

    for module, name in ((triton.tuning, "launch"), (triton, "run")):
        monkeypatch.setattr(module, name, note)
    monkeypatch.setattr(engine, "place_lists", lambda indices, counts, order: (indices, counts))
    grid = TokenGrid(4, 8, 16)
    for block_q, block_k in BLOCKS:
        for dim in HEAD_DIMS:
            orders = TokenOrder(grid, block_q, TILES[block_q]), TokenOrder(grid, block_k, TILES[block_k])
            q = torch.zeros(1, 1, grid.tokens, dim, dtype=torch.float16)
            lse = torch.zeros(q.shape[:3])
            rows = 1, 1, orders[0].blocks
            lists = BlockLists(torch.zeros(*rows, 3, dtype=torch.int32), torch.ones(rows, dtype=torch.int32))
            queries, lists, geometry, segments = visual_call(q, lists, *orders, None)
            exact = BlockSparseInputs(queries, q, q, lists, segments, geometry, 0.1)
            for share in (False, True):
                triton.forward(TailedInputs(exact, None, share), {})
            parts = triton.parts_of(TailedInputs(exact, None, False), {})
            triton.add_gradients((q.clone(), q.clone(), q.clone()), q, lse, q, lse, parts)
    return launches


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launch_is_compiled_ahead_of_time(launched, arch):
    compiled = {}
    for build in declared.builds(arch):
        constants = frozenset(pair for pair in build.constants if not pair[0].startswith("TILE"))
        compiled.setdefault(build.function.rpartition(":")[2], set()).add((constants, build.warps, build.stages))
    assert set(compiled) == {*declared.FUNCTIONS.values(), "outside_kernel", "pseudo_keys_kernel"}
    assert set(triton.JIT) == set(declared.FUNCTIONS)
    for kernel, constants in launched:
        sizes = {name: value for name, value in constants.items() if not name.startswith("TILE")}
        if kernel in triton.JIT:
            launches = fitting(kernel, sizes["BLOCK_Q"], sizes["BLOCK_K"], sizes["BLOCK_D"], 2, arch)
            want = [(frozenset({**sizes, "STEP": x.step}.items()), x.warps, x.stages) for x in launches]
            name = declared.FUNCTIONS[kernel]
        else:
            name, launch = kernel.__name__, triton.OUTSIDE
            if name == "outside_kernel":
                sizes["STEP"] = launch.step
            else:
                launch = triton.MEANS
            want = [(frozenset(sizes.items()), launch.warps, launch.stages)]
        assert want and compiled[name].issuperset(want), name
