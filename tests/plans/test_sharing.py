"""Results that a layer shares between denoising steps: against dense attention, and when they are forgotten."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.plans.memory import ListMemory
from dit_accel.tokens import TokenGrid

GRID = TokenGrid(2, 6, 9, text=5)
WINDOW = {"window": (1, 3, 3)}


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("share", ["residual", "output"])
def test_steps_between_two_refreshes(share):
    """Steps 0 to 5 of 6, each refresh with new tensors: constant tensors give dense attention."""
    plan, stored = dit_accel.plan("gna", GRID, **WINDOW, share=share, refresh=3), {}
    masked = dit_accel.plan("gna", GRID, **WINDOW)
    sums, densities = torch.zeros(2), []
    for step in range(6):
        if step % 3 == 0:
            q, k, v = torch.randn(3, 2, 3, GRID.tokens, 8)
        memory = ListMemory(step, 0, step == 5, stored)
        out, exact = plan.attend(q, k, v, memory=memory, density_sum=sums.zero_()), dense(q, k, v)
        residual = exact - masked.attend(q, k, v)
        # one rounding of the residual and one of the sum
        limit = torch.finfo(out.dtype).eps / 2 * (residual.abs() + exact.abs()) * 1.01
        assert ((out - exact).abs() <= (0 if step % 3 == 0 or share == "output" else limit)).all()
        densities.append(sums[0].item())
        assert (not stored) if step == 5 else stored[0].result.nbytes == q.nbytes
    part = masked.density if share == "residual" else 0
    assert densities == pytest.approx([1 + part, part, part] * 2)


@pytest.mark.parametrize("share", ["residual", "output"])
def test_another_shape_plan_or_branch_refreshes(share):
    plans = [dit_accel.plan("gna", GRID, **WINDOW, share=share, refresh=9) for _ in range(2)]
    q, k, v = torch.randn(3, 2, 3, GRID.tokens, 8)
    stored = {}

    def is_dense(plan, step, number, *tensors):
        return torch.equal(plan.attend(*tensors, memory=ListMemory(step, number, False, stored)), dense(*tensors))

    assert is_dense(plans[0], 0, 0, q, k, v)
    assert not is_dense(plans[0], 1, 0, k, q, v)  # shared
    assert is_dense(plans[0], 1, 1, k, q, v)
    assert is_dense(plans[0], 2, 0, k[:1], q[:1], v[:1])
    assert is_dense(plans[1], 3, 0, k[:1], q[:1], v[:1])
    assert not is_dense(plans[1], 8, 0, q[:1], k[:1], v[:1])
    assert is_dense(plans[1], 12, 0, q[:1], k[:1], v[:1])
    # nothing that a caller does to a result reaches what is kept
    plans[0].attend(q, k, v, memory=ListMemory(0, 0, False, stored)).zero_()
    plans[0].attend(q, k, v, memory=ListMemory(1, 0, False, stored)).zero_()
    out = plans[0].attend(q, k, v, memory=ListMemory(2, 0, False, stored))
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-6)


class Pipe:
    def __init__(self, transformer):
        self.transformer, self.scheduler = transformer, FlowMatchEulerDiscreteScheduler()

    def start(self, step):
        self.scheduler.set_timesteps(4)
        self.go(step)

    def go(self, step):
        self.scheduler._step_index = step


def test_branches_and_runs_in_a_transformer(tiny_wan, wan_inputs):
    """Two guidance branches with equal inputs at all steps are dense; so is a run after one that was broken off."""
    model = tiny_wan()
    pipe, branches = Pipe(model), [wan_inputs(3, 6, 8, batch=1) for _ in range(3)]
    for number, branch in enumerate(branches):
        branch["hidden_states"] = branch["hidden_states"].roll(number, -1) * (number + 1)

    def call(number):
        return model(**branches[number], return_dict=False)[0]

    with torch.no_grad():
        wanted = [call(number) for number in range(3)]
        with dit_accel.accelerated(pipe, "gna", window=1, share="residual", refresh=3) as accel:
            for first, second in ((0, 1), (2, 0)):  # the second run begins where the first was broken off
                pipe.start(0)
                assert all(torch.equal(call(number), wanted[number]) for number in (first, second))
                pipe.go(1)
                for number in (first, second):
                    torch.testing.assert_close(call(number), wanted[number], rtol=0, atol=1e-5)
                pipe.start(0)
                call(first)
            layers = accel.report().layers
        with dit_accel.accelerated(pipe, "gna", window=1, share="output"):
            assert torch.equal(call(0), wanted[0])
    size = branches[0]["hidden_states"][0, 0].numel() // 4 * 24 * 4  # tokens x width x fp32
    assert {layer.kept_bytes for layer in layers} == {2 * size}


def test_what_cannot_share_is_refused(tiny_wan, wan_inputs):
    for settings, words in (
        ({"refresh": 2}, "share='residual' 'output'"),
        ({"share": "some"}, "share none residual output"),
        ({"share": "output", "refresh": 0}, "refresh 1"),
    ):
        with pytest.raises(DitAccelError, match=names(words)):
            dit_accel.plan("gna", GRID, window=1, **settings)
    model, settings = tiny_wan(), {"window": 1, "share": "output", "refresh": 2}
    with pytest.raises(DitAccelError, match=names("share='none'")):
        dit_accel.accelerate(model, "gna", **settings, verify="first-call")
    with dit_accel.accelerated(model, "gna", **settings) as accel:
        accel.set_step(0, 4)
        with pytest.raises(DitAccelError, match=names("share='none'")):
            model(**wan_inputs(3, 6, 8, batch=1))


def test_compiled_layers_share(tiny_wan, wan_inputs):
    """A compiled model sees one operator, so what is kept is not part of the graph."""
    model, inputs = tiny_wan(), wan_inputs(3, 6, 8, batch=1)
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(-1)}
    outputs = []
    for compiled in (False, True):
        called = torch.compile(model, backend="eager") if compiled else model
        with dit_accel.accelerated(model, "gna", window=1, share="residual", refresh=2) as accel, torch.no_grad():
            outputs.append([])
            for step in range(3):
                accel.set_step(step, 4)
                outputs[-1].append(called(**(other if step == 1 else inputs), return_dict=False)[0])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert not torch.equal(outputs[0][0], outputs[0][1])
