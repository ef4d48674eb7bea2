"""Which denoising step a call belongs to."""

import copy

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.hooks.steps import StepClock
from dit_accel.schedule import Step

SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "heun": FlowMatchHeunDiscreteScheduler,
    "without an index": CogVideoXDDIMScheduler,
}


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def run(pipe, clock, steps, start=0, calls=2):
    """Steps that the clock tells on the way of a pipeline that calls its transformer `calls` times a step."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    sample, told = torch.ones(1, 4, 1, 2, 2), []
    for t in scheduler.timesteps[start * scheduler.order :]:
        told += [clock.now(t.expand(3)) for _ in range(calls)]
        extra = {"eta": 0.0} if isinstance(scheduler, CogVideoXDDIMScheduler) else {}
        sample = scheduler.step(torch.zeros_like(sample), t, sample, **extra, return_dict=False)[0]
    return told


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_calls_twice_a_step(name):
    pipe = Pipe(SCHEDULERS[name]())
    clock = StepClock(pipe)
    for steps in (5, 3):
        told = run(pipe, clock, steps)
        assert {step.count for step in told} == {steps}
        indices = [step.index for step in told]
        assert indices == sorted(indices)
        assert {index: indices.count(index) for index in range(steps)} == {
            index: 2 * (pipe.scheduler.order if index < steps - 1 else 1) for index in range(steps)
        }


def test_timesteps_in_units_of_their_own_start_at_the_first_step():
    """Before its first step a scheduler has no index; after it the index alone tells, whatever the model's timestep."""
    pipe = Pipe(SCHEDULERS["euler"]())
    clock = StepClock(pipe)
    pipe.scheduler.set_timesteps(3)
    told, sample = [], torch.ones(1, 4, 1, 2, 2)
    for t in pipe.scheduler.timesteps:
        told.append(clock.now(None))
        sample = pipe.scheduler.step(sample, t, sample, return_dict=False)[0]
    assert told == [Step(index, 3) for index in range(3)]
    pipe.scheduler = SCHEDULERS["without an index"]()
    pipe.scheduler.set_timesteps(3)
    with pytest.raises(DitAccelError, match=names("set_step")):
        clock.now(None)


@pytest.mark.parametrize("begin_index", [True, False])
def test_image_to_image_starts_where_it_starts(begin_index):
    pipe = Pipe(SCHEDULERS["euler"]())
    clock = StepClock(pipe)
    pipe.scheduler.set_timesteps(10)
    if begin_index:
        pipe.scheduler.set_begin_index(6)
    assert clock.now(pipe.scheduler.timesteps[6]) == Step(6, 10)
    assert [step.index for step in run(pipe, clock, 10, start=7, calls=1)] == [7, 8, 9]


def test_a_replaced_scheduler_is_followed_and_a_copy_is_not():
    pipe = Pipe(SCHEDULERS["euler"]())
    clock = StepClock(pipe)
    run(pipe, clock, 4)
    pipe.scheduler = SCHEDULERS["unipc"]()
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(50)
    assert [step.index for step in run(pipe, clock, 3, calls=1)] == [0, 1, 2]


def test_per_token_timesteps_count_by_the_largest():
    pipe = Pipe(CogVideoXDDIMScheduler())
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[2]
    assert StepClock(pipe).now(torch.tensor([[0, 0, t, t]])) == Step(2, 4)


def test_a_bare_transformer_follows_the_values():
    clock = StepClock()
    values = [1000, 1000, 700, 700, 200, 900, 100]
    told = [clock.now(torch.tensor([float(value)])) for value in values]
    assert [step.index for step in told] == [0, 0, 1, 1, 2, 0, 1]
    assert told[2].count is None
    assert told[2].progress == pytest.approx(0.3)


def test_set_wins_until_it_is_taken_back():
    pipe = Pipe(SCHEDULERS["euler"]())
    pipe.scheduler.set_timesteps(4)
    clock = StepClock(pipe)
    clock.set(2, 9)
    assert clock.now(None) == Step(2, 9)
    clock.set(None)
    assert clock.now(pipe.scheduler.timesteps[0]) == Step(0, 4)


@pytest.mark.parametrize("step", [(3, 3), (-1, 3), (0, 0), (0, None), (0.5, 2), (True, 2)])
def test_set_refuses_what_is_no_step(step):
    with pytest.raises(DitAccelError, match=names("0")):
        StepClock().set(*step)


def test_without_a_trajectory_the_advice_is_to_set():
    empty = type("Scheduler", (), {"timesteps": None})()
    for scheduler in (empty, *(make() for make in SCHEDULERS.values())):
        pipe = Pipe(scheduler)
        clock = StepClock(pipe)
        with pytest.raises(DitAccelError, match=names("set_step")):
            clock.now(torch.tensor(999.0))
        assert clock.now_if_told(torch.tensor(999.0)) is None
    with pytest.raises(DitAccelError, match=names("set_step")):
        StepClock().now(None)


def test_a_pipeline_made_from_one_that_is_gone_tells_the_steps():
    """As `from_pipe` does, the new one has the other's scheduler; also one that replaced the first."""
    pipe = Pipe(SCHEDULERS["euler"]())
    clock = StepClock(pipe)
    pipe.scheduler = SCHEDULERS["unipc"]()
    run(pipe, clock, 3)
    other = Pipe(pipe.scheduler)
    del pipe
    assert run(other, clock, 4, calls=1) == [Step(index, 4) for index in range(4)]
    del other
    assert clock.reads_values


def test_the_clock_does_not_keep_the_pipeline():
    pipe = Pipe(SCHEDULERS["euler"]())
    clock = StepClock(pipe)
    assert not clock.reads_values
    del pipe
    assert clock.reads_values
