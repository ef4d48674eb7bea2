"""The Gluon forward of attention with the tail: natively on compute capability 9.0, else under the emulator.

Pseudo-keys, the map and the backward are Triton's, so that ``TRITON_INTERPRET=1`` must be set before Triton is
imported; this file runs in a process of its own. The interpreter has no bfloat16, so bf16 runs on a GPU alone.
"""

import dataclasses
import functools

import pytest
import torch
from tail_calls import TEXT, Case, check, check_rows_without_keys, lists_of, setup

from dit_accel.kernels import impls, obstacles
from dit_accel.kernels.cuts import block_means
from dit_accel.kernels.records import PseudoKeys
from dit_accel.kernels.tail.api import attend_with_tail
from dit_accel.order import valid_tokens
from dit_accel.tokens import TokenGrid

gluon = pytest.importorskip("dit_accel.kernels.tail.gluon")
gluon_forward = pytest.importorskip("dit_accel.kernels.tail.gluon_forward")
engine = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.forward")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
pytestmark = calls.SOMEWHERE
NATIVE, KERNEL = calls.NATIVE, "tail_gluon_fwd_kernel"


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """Runs "gluon" under the emulator, where no GPU runs it; a test may ask for an order of events or a kernel."""

    def use(kernel=gluon_forward.tail_gluon_fwd_kernel, **options):
        monkeypatch.setattr(gluon, KERNEL, calls.Emulated(kernel, **options))

    if not NATIVE:
        for row in (impls.named("gluon"), impls.named("gluon_triton")):
            key = row.kernel, row.name
            monkeypatch.setitem(impls._TABLE, key, dataclasses.replace(row, cannot=obstacles.nothing))
        monkeypatch.setattr(gluon.engine, "multiprocessors", lambda _: 2)
        use()
    return use


SMALL = {"block_q": 128, "block_k": 64, "dim": 64, "batch": 1, "heads": 1, "dtype": torch.float16, "impl": "gluon"}
WIDE = SMALL | {"block_k": 128, "dim": 128}
FRAMES = {"tile_q": (2, 8, 8), "tile_k": (1, 8, 8)}
# Tiles of 64 slots that hold two tokens, the last one: more steps of pseudo-keys than buffers, from few tokens
LONG = SMALL | {"grid": TokenGrid(1, 801, 1), "tile_k": (1, 2, 32), "listed": 0.02}
# Text in both samples, with lengths of their own; rows list from one block to all
VIDEO = TokenGrid(3, 7, 29, **TEXT)
CASES = {
    "one token": SMALL | {"grid": TokenGrid(1, 1, 1)},
    "one block": WIDE | {"grid": TokenGrid(1, 8, 16), "size": 4.0},
    "ragged": SMALL | {"grid": VIDEO, "text_lens": (11, 3), "batch": 2, "heads": 2, "listed": 0.4},
    "text first": WIDE | {"grid": TokenGrid(2, 9, 15, text=129, text_first=True), "text_lens": (70,)} | FRAMES
    | {"tile_k": (2, 8, 8)},
    "tiles": SMALL | {"grid": TokenGrid(3, 10, 12), "dropped": 0.4, "size": 4.0} | FRAMES,
    "wide": WIDE | {"grid": VIDEO, "dropped": 0.3, "first_order": True, "text_lens": (0,)},
    "long": LONG | {"first_order": True},
    "everything listed": SMALL | {"grid": VIDEO, "listed": 1.0, "first_order": True},
    "everything else dropped": SMALL | {"grid": VIDEO, "dropped": 1.0},
    "scale below 0": SMALL | {"grid": TokenGrid(1, 10, 20), "scale": -0.3},
    "scale 0": SMALL | {"grid": TokenGrid(1, 10, 20), "scale": 0.0},
}  # fmt: skip


@pytest.fixture
def in_pytorch(monkeypatch):
    """Pseudo-keys made by PyTorch, faster than interpreted; tests/kernels/tail/test_triton.py holds their kernel."""

    def pseudo_keys(self):
        means = (block_means(x, self.key_order).to(x.dtype) for x in self.call[1:3])
        return PseudoKeys(*means, valid_tokens(self.key_order).float().log(), self.outside, self.key_blocks)

    if not NATIVE:
        monkeypatch.setattr(gluon.TailLaunches, "pseudo_keys", pseudo_keys)


@pytest.mark.parametrize("case", CASES)
def test_the_forward_is_within_the_budget(in_pytorch, case):
    check(Case(**CASES[case]), gradients=False)


@pytest.mark.skipif(not NATIVE, reason="the interpreter has no bfloat16")
@pytest.mark.parametrize("case", CASES)
def test_in_bf16(case):
    check(Case(**CASES[case] | {"dtype": torch.bfloat16}))


@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradients_of_triton_go_with_it(first_order):
    check(Case(**SMALL | {"grid": TokenGrid(1, 9, 20, text=3), "impl": "gluon_triton", "first_order": first_order}))


def forward(case):
    """Output, LSE and share of the tail, on the CPU."""
    tensors, _, listed, dropped = setup(case)
    lists = lists_of(listed)
    q, k, v = (x.to(case.device) for x in tensors)
    options = {"dropped": None if dropped is None else dropped.to(case.device), "impl": case.impl}
    results = attend_with_tail(q, k, v, lists.to(case.device), *case.orders, share=True, **options)
    return [x.cpu() for x in results]


def test_rows_without_keys_are_zero_and_without_listed_keys_all_tail():
    check_rows_without_keys("gluon_triton", dtype=torch.float16, block_k=64, dim=64)


@pytest.mark.skipif(NATIVE, reason="a GPU has its own order of events")
@pytest.mark.parametrize("case", ["long", "tiles"])
def test_every_order_of_events_gives_the_same_bits(emulate, in_pytorch, case):
    want = forward(Case(**CASES[case]))
    for seed, order in enumerate((*emulator.ORDERS, "random")):
        emulate(seed=seed, order=order)
        for name, result, first in zip(("out", "lse", "share"), forward(Case(**CASES[case])), want, strict=True):
            assert torch.equal(result, first), (name, order)


FREE = "        mbarrier.wait(buffers.k_empty.index(stage), phase ^ 1)\n"
ARRIVE = "        mbarrier.arrive(buffers.k_full.index(stage), count=1)\n"
PUT = "        buffers.biases.index(stage).store(biases)\n"
V_FREE = "        mbarrier.wait(buffers.v_empty.index(stage), phase ^ 1)\n"
KEYS_IN = (
    "        copy_in(pooled_k, run, buffers.k_full.index(stage), buffers.k.index(stage).reshape([1, 1, KEYS, D]))\n"
)
VALUES_IN = KEYS_IN.replace("k_full", "v_full").replace("pooled_k", "pooled_v").replace("buffers.k.", "buffers.v.")
EARLY = "        buffers.biases.index((end + i + 1) % STAGES).store(biases_of(i + 1, outside, pseudo, scale))\n"
PRODUCER_FAULTS = {
    "phase of k_empty": ([(FREE, FREE.replace("phase ^ 1", "phase"))], {"nothing can go on"}),
    "phases of the list's start": ([("(end + i) // STAGES & 1", "i // STAGES & 1")], {"nothing can go on", "other"}),
    "stages of the list's start": ([("(end + i) % STAGES", "i % STAGES")], {"nothing can go on", "other"}),
    "values not announced": (
        [("        mbarrier.expect(buffers.v_full.index(stage), KEYS * D * 2)\n", "")], {"nothing can go on"},
    ),
    "bias of the next step written early": (
        [(V_FREE, EARLY + V_FREE)], {"other"},
    ),
    "bias written late": ([(PUT, ""), (VALUES_IN, VALUES_IN + PUT)], {"other"}),
    "bias not written": ([(PUT, "")], {"other"}),
    "bias of the step before": ([("= biases_of(i, outside", "= biases_of(gl.maximum(i - 1, 0), outside")], {"other"}),
    "pseudo-keys announced early": (
        [(ARRIVE, ""), (KEYS_IN, KEYS_IN.replace("k_full", "v_full") + ARRIVE)],
        {"nothing can go on", "other", "got more"},
    ),
    "pseudo-keys of the step before": ([("RUN - pseudo.blocks + i * KEYS", "RUN - pseudo.blocks")], {"other"}),
    "pseudo-keys of the next head": (
        [("(RUN, (head + 1) * pseudo.blocks", "(RUN, (head + 1) * pseudo.blocks + 1")], {"other", "leaves"},
    ),
}  # fmt: skip
LOAD = "scores += buffers.biases.index(i % STAGES).load(gl.SliceLayout(0, LAYOUT))[None, :]"
CONSUMER_FAULTS = {
    "bias of another buffer": ([(LOAD, LOAD.replace("i % STAGES", "(i + 1) % STAGES"))], {"other"}),
    "listed steps biased": ([("if i >= end_of(walk, BLOCK_K):", "if i >= 0:")], {"other"}),
    "pseudo-keys masked": ([("masked_step &= i < end_of(walk, BLOCK_K)", "pass")], {"other"}),
    "share of all": (
        [("listed = gl.where(i < end_of(walk, BLOCK_K), l, listed * rescale)", "listed = l")], {"other"},
    ),
}  # fmt: skip


@functools.cache
def of_the_kernel():
    """Its results for `LONG`, of the kernel that a test starts with."""
    return forward(Case(**LONG))


def signs(emulate, kernel, want):
    """What is wrong in some order of events: an emulator's sentence, or another result."""
    seen = set()
    for seed, order in enumerate((*emulator.ORDERS, "lazy", "random")):
        emulate(kernel, seed=seed, order=order)
        try:
            results = forward(Case(**LONG))
            seen |= {"other"} if any(not torch.equal(a, b) for a, b in zip(results, want, strict=True)) else set()
        except emulator.KernelError as error:
            seen.add(str(error))
        if seen:
            return seen
    return seen


@pytest.mark.skipif(NATIVE, reason="what hangs here would hang a GPU")
@pytest.mark.parametrize("fault", [*PRODUCER_FAULTS, *CONSUMER_FAULTS])
def test_the_emulator_finds_what_is_wrong_in_the_kernel(emulate, in_pytorch, tmp_path, fault):
    want = of_the_kernel()
    changes, known = (PRODUCER_FAULTS | CONSUMER_FAULTS)[fault]
    with calls.changed(tmp_path, (engine, gluon_forward), KERNEL, *changes) as kernel:
        seen = signs(emulate, kernel, want)
    assert seen and all(any(sign in one for sign in known) for one in seen), seen
