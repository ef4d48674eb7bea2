"""The Gluon forward against the reference in fp64: natively on compute capability 9.0, else under the emulator.

The bits of partial blocks are Triton's, so that ``TRITON_INTERPRET=1`` must be set before Triton is
imported; `make test` runs this file in a process of its own.
"""

import dataclasses

import pytest
import torch
from accuracy import assert_accurate, plain_attention
from block_sparse_calls import block_sparse_attention
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.kernels import impls, obstacles

gluon_forward = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.forward")
gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.launches")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
FRAMES, SMALL, WIDE, NATIVE, rounded = calls.FRAMES, calls.SMALL, calls.WIDE, calls.NATIVE, calls.rounded
forward, forward_once = calls.forward, calls.forward_once
pytestmark = [calls.SOMEWHERE, pytest.mark.usefixtures("emulate")]
DTYPES = [torch.float16, torch.bfloat16]
KERNEL = gluon_forward.block_sparse_gluon_fwd_kernel
SOURCES = ("items", "producer", "forward")
MODULES = [pytest.importorskip(f"dit_accel.kernels.block_sparse.gluon.{name}") for name in SOURCES]


# Pairwise over: length, products and bands, raster and tiles of several shapes, padding at borders, text and
# conditioning and where they lie with a length per sample, lists per head, empty lists, lists longer than the buffers,
# queries of their own, head size, key block, input size and scale
CASES = {
    "one-token": {"shape": (1, 1, 1)} | SMALL,
    "one-whole-block": {"shape": (1, 1, 128), "size": 4.0} | WIDE,
    "text": {"shape": (1, 7, 29), "text": 70, "text_lens": [3, 70], "batch": 2} | SMALL,
    "text-first": {"shape": (2, 9, 15), "text": 129, "text_first": True, "text_lens": [128]} | WIDE | FRAMES
    | {"tile_k": (2, 8, 8)},
    "no-valid-text": {"shape": (2, 8, 8), "text": 65, "text_lens": [0]} | SMALL | FRAMES,
    "between": {
        "shape": (2, 9, 10), "method": "gna", "config": {"window": (2, 5, 5), "causal": (True, False, True)},
        "text": 5, "conditioning": 67, "between": True, "per_sample": True, "gap": 2, "text_lens": [0, 3], "batch": 2,
        "size": 16.0,
    } | SMALL,
    "whole-tiles": {"shape": (4, 16, 16), "topk": 6, "heads": 2} | SMALL | FRAMES,
    "ragged-tiles": {"shape": (3, 10, 12), "method": "gna", "config": {"window": (3, 7, 9)}, "text": 70} | SMALL
    | FRAMES,
    "ragged-wide-tiles": {"shape": (3, 10, 12), "method": "gna", "config": {"window": (3, 7, 9)}} | WIDE | FRAMES
    | {"tile_k": (2, 8, 8)},
    "bands": {"shape": (4, 5, 37), "method": "radial", "config": {"decay": 0.4}} | WIDE | {"dim": 64},
    "banded-tiles": {"shape": (4, 6, 20), "method": "radial", "config": {"decay": 0.5}, "text": 4, "text_lens": [1]}
    | SMALL | {"tile_q": (4, 4, 8), "tile_k": (4, 1, 16)},
    "flat-tiles": {"shape": (1, 3, 150), "method": "gna", "config": {"window": (1, 2, 70)}} | WIDE
    | {"tile_q": (1, 1, 128), "tile_k": (1, 1, 128)},
    "square-tiles": {"shape": (1, 20, 20), "method": "gna", "config": {"window": (1, 9, 7), "dilation": (1, 2, 1)}}
    | SMALL | {"tile_q": (1, 8, 16), "tile_k": (1, 16, 4)},
    "upright-tiles": {"shape": (2, 40, 3)} | WIDE | {"tile_q": (2, 64, 1), "tile_k": (2, 32, 2)},
    "heads": {"shape": (3, 9, 15), "topk": 3, "text": 5, "text_lens": [3, 5], "batch": 2, "heads": 2} | SMALL,
    "heads-partial": {
        "shape": (3, 9, 12), "method": "gna", "config": {"window": (1, 7, 7)}, "per_head": True, "text": 3,
    } | SMALL | {"heads": 2},
    "tile-method": {"shape": (4, 6, 11), "method": "tile", "config": {"references": 1}, "conditioning": 66} | SMALL,
    "long": {"shape": (1, 8, 200), "size": 16.0} | SMALL,
    "queries-longer": {"shape": (1, 5, 24), "query_grid": (2, 5, 24), "topk": 1, "heads": 2} | SMALL,
    "scale-below-0": {"shape": (1, 10, 20), "scale": -0.3} | SMALL,
    "scale-0": {"shape": (1, 10, 20), "scale": 0.0, "size": 16.0} | SMALL,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_forward_is_within_the_budget(make_problem, case, dtype):
    if dtype == torch.bfloat16 and not NATIVE and case not in ("text", "ragged-wide-tiles", "long"):
        pytest.skip("bfloat16 is emulated on a few cases: the addresses and the order of events are the same")
    problem = rounded(make_problem(**CASES[case]), dtype)
    exact = forward(problem, "reference", torch.float64)
    out, lse = plain_attention(problem.q, problem.k, problem.v, problem.mask(), problem.scale)
    plain = {"out": out, "lse": lse.masked_fill(lse == float("-inf"), 0.0)}
    for name, result in forward(problem).items():
        assert_accurate(name, result, plain[name], exact[name])


def test_the_gradients_of_triton_go_with_it(make_problem):
    partial = {"shape": (1, 9, 10), "method": "gna", "config": {"window": (1, 5, 5)}, "text": 3} | SMALL
    make_problem(**partial).check("gluon_triton", torch.float16)


@pytest.mark.skipif(NATIVE, reason="a GPU has its own order of events")
@pytest.mark.parametrize("case", ["long", "ragged-wide-tiles", "padded"])
def test_every_order_of_events_gives_the_same_bits(make_problem, emulate, case):
    problem = rounded(make_problem(**(PADDED if case == "padded" else CASES[case])), torch.float16)
    want = forward(problem)
    for seed, order in enumerate((*emulator.ORDERS, "random")):
        emulate(seed=seed, order=order)
        for name, result in forward(problem).items():
            assert torch.equal(result, want[name]), (name, order)


WAIT_K = "mbarrier.wait(buffers.k_empty.index(stage), phase ^ 1)"
RELEASE_K = "            release_keys(i, end, buffers, STAGES, KEEP)\n"
RELEASE_LAST = "        mbarrier.arrive(buffers.v_empty.index(last), count=1)\n"
RELEASE_V = "            mbarrier.arrive(buffers.v_empty.index(before), count=1)\n"
WAIT_S = "            scores = biased(warpgroup_mma_wait(1, deps=(scores,)), i"
WAIT_V = "            mbarrier.wait(buffers.v_full.index(before), (i - 1) // STAGES & 1)\n"
FAULTS = {
    "phase of k_empty": ([(WAIT_K, WAIT_K.replace("phase ^ 1", "phase"))], "nothing can go on"),
    "phase of v_full": ([("(i - 1) // STAGES & 1)", "i // STAGES & 1)")], "nothing can go on"),
    "k never released": ([(RELEASE_K, "")], "nothing can go on"),
    "scores not waited for": ([(WAIT_S, WAIT_S.replace("wait(1", "wait(2"))], "leaves in flight"),
    "output not fenced": ([("    fence_async_shared()\n    put(", "    put(")], "without fence_async_shared"),
    "last v never released": ([(RELEASE_LAST, "")], "nothing can go on"),
}


@pytest.mark.skipif(NATIVE, reason="what hangs here would hang a GPU")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds_what_is_wrong_in_the_kernel(make_problem, emulate, tmp_path, fault):
    changes, words = FAULTS[fault]
    problem = rounded(make_problem(**CASES["long"]), torch.float16)
    with calls.changed(tmp_path, MODULES, KERNEL.fn.__name__, *changes) as kernel:
        emulate(kernel)
        with pytest.raises(emulator.KernelError, match=names(words)):
            forward(problem)


@pytest.mark.skipif(NATIVE, reason="what is read here is the memory of another tile")
@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        pytest.param([(RELEASE_V, ""), (WAIT_V, WAIT_V + RELEASE_V)], {"nan"}, id="v released early"),
        pytest.param([(WAIT_V, "")], {"nan", "error"}, id="v not waited for"),
    ],
)
def test_values_of_another_tile_show(make_problem, emulate, tmp_path, changes, signs):
    """In some order of events: a buffer that is released before its product is waited for, and one not waited for."""
    problem, seen = rounded(make_problem(**CASES["long"]), torch.float16), set()
    with calls.changed(tmp_path, MODULES, KERNEL.fn.__name__, *changes) as kernel:
        for seed in range(4):
            emulate(kernel, seed=seed, order="lazy")
            try:
                seen |= {"nan"} if forward(problem)["out"].isnan().any() else set()
            except emulator.KernelError:
                seen.add("error")
            if seen & signs:
                return
    pytest.fail("no order of events showed it")


# 17 of 25 key blocks have padding slots: more steps than buffers, and those that share a buffer differ
PADDED = {"shape": (4, 10, 20), "query_grid": (2, 8, 24), "text": 9} | SMALL | FRAMES
NEXT = "        mbarrier.wait(buffers.v_empty.index(stage), phase ^ 1)\n"
PUT = """        if (i + 1) * (KEYS // BLOCK_K) > walk.listed.tabled:
            put_words(i, near, far, walk, problem, buffers, BLOCK_K, TILE_K, STAGES)
"""
WORD_FAULTS = {
    "not written": [(PUT, "")],
    "written when the keys may be there": [(PUT, ""), (NEXT, PUT + NEXT)],
    "of the other half": [("i % STAGES * 2 + half)", "i % STAGES * 2 + 1 - half)")],
    "of the step before": [("both_words(i, walk", "both_words(i - 1, walk")],
}


@pytest.mark.skipif(NATIVE, reason="a race need not show on a GPU")
@pytest.mark.parametrize("fault", WORD_FAULTS)
def test_words_of_another_step_show(make_problem, emulate, tmp_path, fault):
    """In some order of events, each fault of the words in shared memory changes the result."""
    problem = rounded(make_problem(**PADDED), torch.float16)
    want = forward_once("padded", problem)
    with calls.changed(tmp_path, MODULES, KERNEL.fn.__name__, *WORD_FAULTS[fault]) as kernel:
        for seed, order in enumerate(emulator.ORDERS):
            emulate(kernel, seed=seed, order=order)
            if any(not torch.equal(result, want[name]) for name, result in forward(problem).items()):
                return
    pytest.fail("no order of events showed it")


@pytest.mark.parametrize("case", ["text", "heads"])
def test_poison_in_padding_reaches_nothing(make_problem, case):
    problem = rounded(make_problem(**CASES[case]), torch.float16)
    clean = forward(problem)
    first = problem.options["text_start"][0] + problem.options["text_len"][0]
    last = problem.options["text_start"][0] + problem.options["text"]
    for tensor in (problem.k, problem.v):
        tensor[0, :, first:last] = float("nan")
    for name, result in forward(problem).items():
        assert torch.equal(result, clean[name]), name


def test_a_row_without_keys_is_zero(make_problem):
    problem = rounded(make_problem(**CASES["whole-tiles"]), torch.float16)
    problem.lists[1][..., 1] = 0
    _, lse = problem.call("gluon", return_lse=True) if not NATIVE else problem.to("cuda").call("gluon", return_lse=True)
    order = problem.geometry().query_order.index().view(-1, 128)
    assert not forward(problem)["out"][:, :, order[1]].any()
    assert (lse[:, :, order[1]] == float("-inf")).all()
    assert lse[:, :, order[0]].isfinite().all()


LAYOUTS = {
    "heads outside": lambda x: x.contiguous(),
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused projection": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),
    "copied: odd rows": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "copied: odd samples": lambda x: torch.nn.functional.pad(x.flatten(1), (8, 0))[:, 8:].view(x.shape),
    "copied: elements apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "copied: one row": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(make_problem, layout):
    problem = make_problem(shape=(1, 10, 13), topk=2, **SMALL | {"heads": 2, "batch": 2})
    problem = rounded(problem, torch.float16)
    if layout == "copied: one row":
        problem = dataclasses.replace(problem, k=problem.k[:, :, :1].expand_as(problem.k).contiguous())
    want = forward(problem)
    moved = {name: LAYOUTS[layout](getattr(problem, name)) for name in ("q", "k", "v")}
    if layout == "copied: one row":
        moved["k"] = problem.k[:, :, :1].expand_as(problem.k)
    for name, result in forward(dataclasses.replace(problem, **moved)).items():
        assert torch.equal(result, want[name]), name


def test_packed_lists_are_those_of_each_call(make_problem):
    from dit_accel.kernels.block_sparse.triton_lists import pack

    problem = rounded(make_problem(**CASES["ragged-tiles"]), torch.float16)
    want = forward(problem)
    problem.options["packed"] = pack(problem.block_lists(), problem.geometry())
    problem.lists[0].zero_()
    for name, result in forward(problem).items():
        assert torch.equal(result, want[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_q": 64}, "queries keys 128 64"),
        ({"block_k": 32}, "queries keys 128 64 32"),
        ({"dim": 72}, "head dimensions 64 128 72"),
        ({"dtype": torch.float32}, "float16 bfloat16 float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(make_problem, monkeypatch, change, words):
    monkeypatch.undo()
    dtype = change.pop("dtype", torch.float16)
    problem = make_problem(shape=(1, 10, 13), **SMALL | change)
    with pytest.raises(DitAccelError, match=names(words)):
        problem.call("gluon", dtype)


@pytest.mark.skipif(NATIVE, reason="here is such a GPU")
def test_other_devices_are_refused(make_problem, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(DitAccelError, match=r"compute capability 9\.0"):
        make_problem(shape=(1, 10, 13), **SMALL).call("gluon", torch.float16)


def test_auto_takes_it_for_what_it_can_compute(make_problem, monkeypatch):
    """On a GPU of compute capability 9.0; other head dimensions and dtypes are Triton's."""
    monkeypatch.undo()
    monkeypatch.setattr(obstacles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts = impls.Facts(torch.device("cuda"), torch.bfloat16, 128, 128, 64)
    assert impls.choose(facts)[0].name == "gluon_triton"
    for other in ({"head_dim": 72}, {"block_q": 64}):
        assert impls.choose(dataclasses.replace(facts, **other))[0].name == "triton", other
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert impls.choose(facts)[0].name == "triton"


def test_the_counter_of_a_launch_serves_one_candidate(monkeypatch):
    monkeypatch.setattr(gluon, "LAUNCHES", gluon.LAUNCHES * 2)
    with pytest.raises(AssertionError, match="counter"):
        gluon.queue_of(2, 3, torch.device("cpu"))


def test_it_runs_in_a_compiled_function(make_problem):
    problem = rounded(make_problem(**CASES["one-token"]), torch.float16)
    problem = problem.to("cuda") if NATIVE else problem

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, *problem.lists, impl="gluon", **problem.options)

    assert torch.equal(attend(problem.q, problem.k, problem.v), problem.call("gluon"))
