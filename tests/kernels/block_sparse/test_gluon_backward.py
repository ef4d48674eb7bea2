"""The Gluon gradients against the reference in fp64: natively on compute capability 9.0, else under the emulator.

``TRITON_INTERPRET=1`` must be set before Triton is imported; `make test` runs this file in a process of its own.
"""

import collections
import dataclasses
import os

import pytest
import torch
from accuracy import assert_accurate

from dit_accel.kernels import impls

gluon_dq = pytest.importorskip("dit_accel.kernels.block_sparse.gluon_dq")
gluon_dkdv = pytest.importorskip("dit_accel.kernels.block_sparse.gluon_dkdv")
gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon")
triton = pytest.importorskip("dit_accel.kernels.block_sparse.triton")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
FRAMES, SMALL, WIDE, rounded = calls.FRAMES, calls.SMALL, calls.WIDE, calls.rounded
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and not INTERPRETED
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not NATIVE, reason="needs TRITON_INTERPRET=1 or a GPU of compute capability 9.0"
)
KERNELS = {name: getattr(gluon, name) for name in ("block_sparse_gluon_dq_kernel", "block_sparse_gluon_dkdv_kernel")}
NAMES = ("dq", "dk", "dv")


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """Runs "gluon" under the emulator, where no GPU runs it; a test may ask for an order of events or a kernel."""

    def use(kernels=KERNELS, **options):
        for name, kernel in kernels.items():
            monkeypatch.setattr(gluon, name, calls.Emulated(kernel, **options))

    if not NATIVE:
        row = impls.named("gluon")
        monkeypatch.setitem(impls._TABLE, (row.kernel, row.name), dataclasses.replace(row, cannot=impls.nothing))
        monkeypatch.setattr(triton, "partial_words_kernel", collections.defaultdict(lambda: calls.write_words))
        use()
    return use


# Pairwise over: keys of a block, raster and tiles, padding at borders, text with a length per sample, lists per head,
# empty lists, lists longer than the buffers, queries of their own, head size, dtype, a gradient of the LSE
HALF, BRAIN = torch.float16, torch.bfloat16
CASES = {
    "one-token": ({"shape": (1, 1, 1)} | SMALL, HALF, True),
    "text": ({"shape": (1, 7, 29), "text": 70, "text_lens": [3, 70], "batch": 2} | SMALL, BRAIN, True),
    "text-first": (
        {"shape": (2, 9, 15), "text": 129, "text_first": True, "text_lens": [100]} | WIDE | FRAMES
        | {"tile_k": (2, 8, 8)}, HALF, False,
    ),
    "between": (
        {
            "shape": (2, 9, 10), "method": "gna", "config": {"window": (2, 5, 5), "causal": (True, False, True)},
            "text": 5, "conditioning": 67, "between": True, "per_sample": True, "gap": 2, "text_lens": [0, 3],
            "batch": 2, "size": 4.0,
        } | WIDE | {"dim": 64}, HALF, True,
    ),
    "ragged-tiles": (
        {"shape": (3, 10, 12), "method": "gna", "config": {"window": (3, 7, 9)}, "text": 7} | SMALL | FRAMES
        | {"dim": 128}, BRAIN, False,
    ),
    "upright-tiles": ({"shape": (2, 40, 3)} | WIDE | {"tile_q": (2, 64, 1), "tile_k": (2, 64, 1)}, HALF, True),
    "heads-partial": (
        {"shape": (3, 9, 12), "method": "gna", "config": {"window": (1, 7, 7)}, "per_head": True, "text": 3} | SMALL
        | {"heads": 2}, HALF, True,
    ),
    "long": ({"shape": (1, 8, 100), "size": 4.0} | SMALL, HALF, True),
    "queries-longer": (
        {"shape": (1, 5, 24), "query_grid": (2, 5, 24), "topk": 1, "heads": 2} | SMALL, HALF, False,
    ),
    "scale-below-0": ({"shape": (1, 10, 20), "scale": -0.3} | SMALL, HALF, True),
}  # fmt: skip


def gradients(problem, impl="gluon", dtype=None, lse_gradient=True):
    results = problem.run(impl, dtype or problem.q.dtype, lse_gradient)
    return {name: results[name] for name in NAMES}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_within_the_budget(make_problem, case, monkeypatch):
    settings, dtype, lse_gradient = CASES[case]
    problem = rounded(make_problem(**settings), dtype)
    monkeypatch.setattr(gluon, "forward", reference_forward)
    exact = problem.run("reference", torch.float64, lse_gradient)
    plain, magnitudes = problem.plain(dtype, lse_gradient), problem.magnitudes(exact)
    for name, result in gradients(problem, lse_gradient=lse_gradient).items():
        assert_accurate(name, result, plain[name], exact[name], magnitudes[name])


def reference_forward(call):
    """Rounded from fp64; another test has the forward kernel's output."""
    from dit_accel.kernels.block_sparse import reference

    wide = call._replace(**{name: getattr(call, name).double() for name in "qkv"})
    out, lse = reference.forward(wide)
    return out.to(call.q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.float().contiguous()
