"""A list of steps beside `torch.compile`: its decision is no part of a graph."""

import pytest
import torch
from tiny_models import get, module, run
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel

STEPS = 6
SPARSE = {"method": "sol", "block": 16, "block_q": 16, "order": "morton", "dense_steps": 1}


def of_steps(accel, transformer, tiny, runs=2):
    """Outputs of some runs of two guidance branches."""
    outputs = []
    for _ in range(runs):
        for step in range(STEPS):
            accel.set_step(step, STEPS)
            for sign in (1, -2):
                call = tiny.call()
                call["hidden_states"] = call["hidden_states"] * (1 + step / 20)
                outputs.append(run(transformer, call | {"encoder_hidden_states": sign * call["encoder_hidden_states"]}))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("wan:t2v", {}, "damping=0.5"),
        ("wan:t2v", SPARSE, "reuse=output,damping=0.5"),
        ("flux2:edit", {}, "reuse=output"),
        ("ltx2:2.0", {}, "damping=0.5"),
    ],
)
def test_a_whole_model_is_compiled(name, method, settings):
    """Same bits as uncompiled. A graph of computed calls, one of skipped ones, one of dense steps beside a method."""
    tiny = get(*name.split(":"))
    transformer = module("wan").build(layers=4) if name == "wan:t2v" else tiny.build()
    counter = CompileCounterWithBackend("eager")
    cache = f"steps:computed=0x1x4,{settings}"
    with dit_accel.accelerated(transformer, **{"method": "dense"} | method, cache=cache) as accel:
        eager = of_steps(accel, transformer, tiny)
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        assert torch.equal(of_steps(accel, compiled, tiny), eager)
        assert counter.frame_count == (3 if method else 2)
        report = accel.report().cache
        assert all(branch.skipped == 4 * (STEPS - 3) for branch in report.branches)
        assert [step for step, share in report.branches[0].steps.items() if share == 1] == [0, 1, 4]


def test_repeated_blocks_are_compiled():
    """The first block, the last one and those between have graphs of their own, computed and skipped."""
    transformer, tiny = module("wan").build(layers=10), get("wan", "t2v")
    counter = CompileCounterWithBackend("eager")
    with dit_accel.accelerated(transformer, "dense", cache="steps:computed=0x1x4,damping=0.5") as accel:
        eager = of_steps(accel, transformer, tiny)
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert torch.equal(of_steps(accel, transformer, tiny), eager)
    assert counter.frame_count == 6
