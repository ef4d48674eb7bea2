"""Segments of a trajectory, and the velocity that leads to the end of one."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from messages import names

from dit_accel import DitAccelError
from dit_accel.train.process import Flow, LevelSegments, process_of
from dit_accel.train.settings import Distillation


def grid(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def make(segments=4, teacher_steps=16):
    return LevelSegments(Flow(6.0), grid(segments), grid(teacher_steps))


def test_segments_end_where_the_student_steps_to():
    segments = make()
    ends = grid(4)
    assert len(ends) == 5 and ends[0] == 1 and ends[-1] == 0
    assert set(segments.end.tolist()) == set(ends[1:].tolist())
    assert (segments.start > segments.next).all() and (segments.next >= segments.end).all()
    for start, end in zip(segments.start, segments.end, strict=True):
        assert end == max(level for level in ends if level < start - 1e-6)
    assert set(ends[:-1].tolist()) <= set(segments.start.tolist()), "the student's own starting points are trained"


def test_on_straight_trajectories_the_target_is_their_velocity():
    """Where teacher and student agree on one constant velocity, so does the target, at every level."""
    segments = make()
    velocity = torch.randn(len(segments.start), 2, 3, generator=torch.Generator().manual_seed(0))
    noisy = torch.randn_like(velocity)
    index = torch.arange(len(segments.start))
    target = segments.target(noisy, index, lambda x, at: velocity, lambda x, at: velocity)
    assert torch.allclose(target, velocity, atol=1e-4)


def test_where_teacher_and_student_predict_one_clean_sample_the_target_is_that_sample():
    segments = LevelSegments(Flow(6.0, sample=True), grid(4), grid(16))
    noisy, clean = torch.randn(2, len(segments.start), 2, 3, generator=torch.Generator().manual_seed(0))
    target = segments.target(noisy, torch.arange(len(segments.start)), lambda x, at: clean, lambda x, at: clean)
    assert torch.allclose(target, clean, atol=1e-4)


def test_the_target_by_hand():
    """Teacher goes 1 -> 0.9 with velocity 2, the student on to the end 0.7 with 5: (0.1 * 2 + 0.2 * 5) / 0.3 = 4."""
    segments = make()
    segments.start, segments.next, segments.end = torch.tensor([1.0]), torch.tensor([0.9]), torch.tensor([0.7])
    seen = {}

    def student(x, at):
        seen["x"], seen["at"] = x, at
        return torch.full_like(x, 5.0)

    target = segments.target(torch.zeros(1, 2), torch.tensor([0]), lambda x, at: torch.full_like(x, 2.0), student)
    assert torch.allclose(target, torch.tensor(4.0)) and torch.allclose(seen["x"], torch.tensor(-0.2))
    assert seen["at"].item() == pytest.approx(0.9)
    segments.end = torch.tensor([0.9])  # the teacher's step ends the segment: its velocity alone
    target = segments.target(torch.zeros(1, 2), torch.tensor([0]), lambda x, at: torch.full_like(x, 2.0), student)
    assert torch.allclose(target, torch.tensor(2.0))


def test_refused():
    with pytest.raises(DitAccelError, match=names("1 segments teacher_steps")):
        Distillation(8, 4)
    process = process_of(DDIMScheduler(), torch.Size((1, 4, 8, 8)))
    with pytest.raises(DitAccelError, match=names("flow-matching")):
        LevelSegments(process, grid(4), grid(16))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_levels_of_a_scheduler_that_shifts_by_length(kind):
    """As FLUX's pipeline asks for them: even levels, shifted."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    process = process_of(scheduler, torch.Size((1, 1500, 64)))
    even = [1.0, 0.75, 0.5, 0.25]
    scheduler.set_timesteps(sigmas=even, mu=calculate_shift(1500))
    for share, sigma in zip(even, scheduler.sigmas, strict=False):
        assert process.even(share).item() == pytest.approx(sigma.item())


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_flows_of_a_scheduler_that_knows_both_processes(prediction):
    """A step to level 0 from a sample whose prediction is right leads to the clean sample."""
    scheduler = UniPCMultistepScheduler(prediction_type=prediction, use_flow_sigmas=True, flow_shift=6.0)
    process = process_of(scheduler, torch.Size((1, 2, 3)))
    assert isinstance(process, Flow)
    scheduler.set_timesteps(1)
    clean, noise, level = torch.randn(1, 2, 3), torch.randn(1, 2, 3), scheduler.sigmas[:1]
    noisy, target = process.noisy(clean, noise, level), process.target(clean, noise, level)
    stepped = scheduler.step(target, scheduler.timesteps[0], noisy, return_dict=False)[0]
    assert torch.allclose(stepped, clean, atol=1e-5)
    velocity = process.velocity(target, noisy, level)
    assert torch.allclose(velocity, noise - clean, atol=1e-4)
    assert torch.allclose(process.prediction(velocity, noisy, level), target, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion_targets_agree_with_diffusers(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction)
    process = process_of(scheduler, torch.Size((1, 2, 3)))
    clean, noise, level = torch.randn(2, 2, 3), torch.randn(2, 2, 3), torch.tensor([3.0, 700.0])
    noisy = process.noisy(clean, noise, level)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, level.long()))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, level.long())}
    assert torch.allclose(process.target(clean, noise, level), wanted[prediction])
    assert torch.equal(process.timestep(level), level.long())
