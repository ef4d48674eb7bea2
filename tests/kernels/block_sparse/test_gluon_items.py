"""Programs of the Gluon forward that take several items: what is carried from one to the next, under the emulator.

``TRITON_INTERPRET=1`` must be set before Triton is imported; `make test` runs this file in a process of its own.
"""

import pytest
import torch
from accuracy import assert_accurate, plain_attention

gluon_forward = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.forward")
gluon = pytest.importorskip("dit_accel.kernels.block_sparse.gluon.launches")
emulator = pytest.importorskip("emulator")
calls = pytest.importorskip("gluon_calls")
SMALL, NATIVE, rounded, forward, forward_once = (
    calls.SMALL, calls.NATIVE, calls.rounded, calls.forward, calls.forward_once,
)  # fmt: skip
pytestmark = [calls.SOMEWHERE, pytest.mark.usefixtures("emulate")]
KERNEL = gluon_forward.block_sparse_gluon_fwd_kernel
SOURCES = ("items", "producer", "forward")
MODULES = [pytest.importorskip(f"dit_accel.kernels.block_sparse.gluon.{name}") for name in SOURCES]
ANY = {"deadlock", "error", "nan", "other"}
WAIT_Q = "    mbarrier.wait(buffers.q_empty.index(0), (turn & 1) ^ 1)\n"
STORED = "        tma.store_wait(0)\n        mbarrier.arrive(buffers.k_empty.index((first - 1) % STAGES), count=1)\n"
OTHER = "    mbarrier.wait(buffers.q_empty.index(0), turn & 1)  # the other consumer has multiplied what is there\n"
NO_VALUES = "        give_no_values(end, buffers, STAGES)\n"
# Each is right for a program's first item.
ITEM_FAULTS = {
    "the producer counts steps anew": ([("first = PRODUCE_BEHIND(", "first = 0 * PRODUCE_BEHIND(")], {"deadlock"}),
    "consumers count steps anew": (
        [("gl.maximum(end_of(walk, BLOCK_K), walk.first + 1)", "walk.first * 0")],
        {"deadlock", "error"},
    ),
    "phase of q_full": (
        [("mbarrier.wait(buffers.q_full.index(PART), turn & 1)", "mbarrier.wait(buffers.q_full.index(PART), 0)")],
        ANY,
    ),
    "phase of q_empty": ([(WAIT_Q, WAIT_Q.replace("(turn & 1) ^ 1", "1"))], ANY),
    "q overwritten early": ([(WAIT_Q, "")], ANY),
    "another turn's number": (
        [("buffers.numbers.index(turn & 1).load", "buffers.numbers.index((turn & 1) ^ 1).load")],
        ANY,
    ),
    "output stored late": ([(STORED, STORED.split("\n")[1] + "\n")], {"nan"}),
    "output where keys are being multiplied": ([(OTHER, "")], ANY),
    "buffer of the output never released": ([(STORED, "        tma.store_wait(0)\n")], {"deadlock"}),
    "no step for an empty list": ([(NO_VALUES, "")], {"deadlock"}),
    "consumers not ended": ([("    announce_end(number, turn, buffers)\n", "")], {"deadlock"}),
}


@pytest.fixture
def uneven(make_problem, monkeypatch, emulate):
    """Two samples of 7 rows of 0 to 7 steps for 3 buffers; empty rows are first, last and side by side.

    There is a program for each item, until a test says otherwise.
    """
    monkeypatch.setattr(gluon, "multiprocessors", lambda _: 14)
    problem = rounded(make_problem(shape=(1, 7, 128), topk=14, batch=2, **SMALL), torch.float16)
    counts = torch.tensor([[0, 1, 14, 0, 0, 4, 11], [6, 5, 2, 9, 8, 3, 0]], dtype=torch.int32)
    problem.lists[1].copy_(counts[:, None])
    return problem


@pytest.mark.skipif(NATIVE, reason="a GPU has its own number of multiprocessors")
@pytest.mark.parametrize("programs", [1, 3, 13, 50])
def test_programs_take_items_in_turn(monkeypatch, emulate, uneven, programs):
    """Whatever the number of programs and the order of events, the bits are those of one program an item."""
    exact = forward(uneven, "reference", torch.float64)
    out, lse = plain_attention(uneven.q, uneven.k, uneven.v, uneven.mask(), uneven.scale)
    want = forward_once("uneven", uneven)
    plain = {"out": out.nan_to_num(0.0), "lse": lse.masked_fill(lse == float("-inf"), 0.0)}
    for name, result in want.items():
        assert_accurate(name, result, plain[name], exact[name])
    monkeypatch.setattr(gluon, "multiprocessors", lambda _: programs)
    for seed, order in enumerate((*emulator.ORDERS, "random")):
        emulate(seed=seed, order=order)
        for name, result in forward(uneven).items():
            assert torch.equal(result, want[name]), (name, order)


@pytest.mark.skipif(NATIVE, reason="what hangs here would hang a GPU")
@pytest.mark.parametrize("fault", ITEM_FAULTS)
def test_what_is_not_carried_to_the_next_item_shows(monkeypatch, emulate, uneven, tmp_path, fault):
    """In some order of events."""
    changes, signs = ITEM_FAULTS[fault]
    want, seen = forward_once("uneven", uneven), set()
    monkeypatch.setattr(gluon, "multiprocessors", lambda _: 1)
    with calls.changed(tmp_path, MODULES, KERNEL.fn.__name__, *changes) as kernel:
        for seed in range(4):
            for order in emulator.ORDERS:
                emulate(kernel, seed=seed, order=order)
                try:
                    got = forward(uneven)
                    seen |= {"nan"} if got["out"].isnan().any() else set()
                    seen |= {"other"} if any(not torch.equal(got[name], want[name]) for name in want) else set()
                except emulator.Deadlock:
                    seen.add("deadlock")
                except (emulator.KernelError, RuntimeError):  # PyTorch refuses a division by 0
                    seen.add("error")
                if seen & signs:
                    return
    pytest.fail(f"no order of events showed it: {seen}")
