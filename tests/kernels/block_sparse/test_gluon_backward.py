"""The Gluon gradients against the reference in fp64: natively on compute capability 9.0, else under the emulator.

``TRITON_INTERPRET=1`` must be set before Triton is imported; `make test` runs this file in a process of its own.
"""

import collections
import dataclasses

import pytest
import torch
from accuracy import assert_accurate

from dit_accel.kernels import impls, obstacles
from dit_accel.kernels.block_sparse import reference

gluon_dq = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.dq")
gluon_dkdv = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.dkdv")
gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.launches")
triton = pytest.importorskip("dit_accel.kernels.block_sparse.triton")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
FRAMES, SMALL, WIDE, NATIVE, rounded = calls.FRAMES, calls.SMALL, calls.WIDE, calls.NATIVE, calls.rounded
pytestmark = calls.SOMEWHERE
KERNELS = {name: getattr(gluon, name) for name in ("block_sparse_gluon_dq_kernel", "block_sparse_gluon_dkdv_kernel")}
NAMES = ("dq", "dk", "dv")


def reference_forward(call):
    """Rounded from fp64, faster than the emulated kernel."""
    wide = call._replace(**{name: getattr(call, name).double() for name in "qkv"})
    out, lse = reference.forward(wide)
    return out.to(call.q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.float().contiguous()


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """Runs "gluon" under the emulator, where no GPU runs it; a test may ask for an order of events or a kernel."""

    def use(kernels=KERNELS, **options):
        for name, kernel in kernels.items():
            monkeypatch.setattr(gluon, name, calls.Emulated(kernel, **options))

    if not NATIVE:
        row = impls.named("gluon")
        monkeypatch.setattr(gluon, "forward", reference_forward)
        monkeypatch.setitem(impls._TABLE, (row.kernel, row.name), dataclasses.replace(row, cannot=obstacles.nothing))
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
    "long": ({"shape": (1, 6, 100), "size": 4.0} | SMALL, HALF, True),
    "queries-longer": (
        {"shape": (1, 5, 24), "query_grid": (2, 5, 24), "topk": 1, "heads": 2} | SMALL, HALF, False,
    ),
    "scale-below-0": ({"shape": (1, 10, 20), "scale": -0.3} | SMALL, HALF, True),
}  # fmt: skip


LONG = {"shape": (1, 4, 100), "size": 2.0} | SMALL  # more steps and units than buffers


def gradients(problem):
    results = problem.run("gluon", problem.q.dtype)
    return {name: results[name] for name in NAMES}


def assert_right(problem, lse_gradient=True):
    """Gradients within the budget of plain PyTorch in the problem's dtype."""
    dtype = problem.q.dtype
    exact = problem.run("reference", torch.float64, lse_gradient)
    plain, magnitudes = problem.plain(dtype, lse_gradient), problem.magnitudes(exact)
    got = problem.run("gluon", dtype, lse_gradient)
    for name in NAMES:
        assert_accurate(name, got[name], plain[name], exact[name], magnitudes[name])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_within_the_budget(make_problem, case):
    settings, dtype, lse_gradient = CASES[case]
    assert_right(rounded(make_problem(**settings), dtype), lse_gradient)


def test_a_query_without_keys_and_a_key_without_queries(make_problem):
    problem = rounded(make_problem(shape=(1, 1, 300), topk=2, **SMALL | {"heads": 2}), HALF)
    indices, counts = problem.lists
    counts[..., 1] = 0
    indices[:] = torch.tensor([1, 4], dtype=torch.int32)
    assert_right(problem)
    got = gradients(problem)
    assert not got["dq"][:, :, 128:256].any()
    assert not got["dk"][:, :, 128:256].any()
    assert not got["dv"][:, :, 128:256].any()
    assert got["dk"][:, :, 64:128].all(-1).any()


def test_poison_in_padding_reaches_nothing(make_problem):
    """And text that is no key has gradients of 0."""
    problem = rounded(make_problem(**CASES["text"][0]), HALF)
    clean = gradients(problem)
    first = problem.options["text_start"][0] + problem.options["text_len"][0]
    padding = slice(first, problem.options["text_start"][0] + problem.options["text"])
    for tensor in (problem.k, problem.v):
        tensor[0, :, padding] = float("nan")
    got = gradients(problem)
    for name in NAMES:
        assert torch.equal(got[name], clean[name]), name
    assert not got["dk"][0, :, padding].any()
    assert not got["dv"][0, :, padding].any()


@pytest.mark.skipif(NATIVE, reason="a GPU has its own order of events")
@pytest.mark.parametrize("block_k", [64, 128])
def test_every_order_of_events_gives_the_same_bits(make_problem, emulate, block_k):
    problem = rounded(make_problem(**LONG | {"block_k": block_k}), HALF)
    want = gradients(problem)
    for seed, order in enumerate(emulator.ORDERS):
        emulate(seed=seed, order=order)
        for name, result in gradients(problem).items():
            assert torch.equal(result, want[name]), (name, order)


WAIT_SUM = "    if not START:\n        acc = warpgroup_mma_wait(1, deps=(summed,))\n"
RELEASE_K = "            mbarrier.arrive(buffers.k_empty.index(before), count=1)\n"
RELEASE = "        mbarrier.arrive(buffers.empty.index(before), count=1)\n"
WAIT_SUMS = "        dv, dk = warpgroup_mma_wait(1, deps=(dv_sum, dk_sum))\n"
GET = "        mbarrier.wait(buffers.sums_full.index(1 - PART), 0)\n"
FAULTS = {
    "dq: phase of k_full": (gluon_dq, [("needed // STAGES & 1,", "(needed // STAGES & 1) ^ 1,")], "nothing can go on"),
    "dq: k never released": (gluon_dq, [(RELEASE_K, "            pass\n")], "nothing can go on"),
    "dq: k released early": (
        gluon_dq,
        [(RELEASE_K, "            pass\n"), (WAIT_SUM, "    if not START and HALF == 0:\n" + RELEASE_K[4:] + WAIT_SUM)],
        "nan",
    ),
    "dkdv: phase of empty": (gluon_dkdv, [("(unit // STAGES & 1) ^ 1", "unit // STAGES & 1")], "nothing can go on"),
    "dkdv: released early": (gluon_dkdv, [(WAIT_SUMS + RELEASE, RELEASE + WAIT_SUMS)], "nan"),
    "dkdv: sums not waited for": (gluon_dkdv, [(GET, "")], "nan"),
    "dkdv: not fenced": (
        gluon_dkdv,
        [("    fence_async_shared()\n    put(", "    put(")],
        "without fence_async_shared",
    ),
}


@pytest.mark.skipif(NATIVE, reason="what hangs here would hang a GPU")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds_what_is_wrong_in_a_kernel(make_problem, emulate, tmp_path, fault):
    """A wrong phase and a missing release as a deadlock, an early one as NaN in some order of events."""
    module, changes, words = FAULTS[fault]
    name = next(name for name in KERNELS if hasattr(module, name))
    problem = rounded(make_problem(**LONG), HALF)
    with calls.changed(tmp_path, [module], name, *changes) as kernel:
        for seed in range(4):
            emulate({name: kernel}, seed=seed, order="lazy")
            if words != "nan":
                with pytest.raises(emulator.KernelError, match=words):
                    gradients(problem)
                return
            if any(result.isnan().any() for result in gradients(problem).values()):
                return
    pytest.fail("no order of events showed it")
