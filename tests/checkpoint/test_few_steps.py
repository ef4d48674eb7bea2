"""Few-step sampling: noise levels, updates in closed form, a pipeline's defaults, and all of it undone."""

import copy
import inspect

import pytest
import torch
from accuracy import assert_accurate
from messages import names

from dit_accel.checkpoint import few_steps
from dit_accel.checkpoint.few_steps import Sampler, dmd, h3, rcm
from dit_accel.checkpoint.scheduler import FewStepScheduler
from dit_accel.errors import DitAccelError

CALL = {"num_inference_steps": 4, "guidance_scale": 1.0}
SIZES = {"height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}


def started(sampler, steps):
    scheduler = FewStepScheduler(sampler.sigmas, sampler.timesteps, sampler.ode, sampler.dataward)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    ("sampler", "sigmas", "timesteps"),
    [
        (rcm(80), (0.987654, 0.933781, 0.852895, 0.608979), (988, 932, 852, 608)),
        (rcm(200), (0.995025, 0.933781, 0.852895, 0.608979), (996, 932, 852, 608)),
        (dmd((1000.0, 757.0, 522.0), 8), (1, 0.756757, 0.521739), (1000, 757, 522)),
    ],
)
def test_published_levels(sampler, sigmas, timesteps):
    for steps in range(1, len(sigmas) + 1):
        scheduler = started(sampler, steps)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas[:steps], 0.0]), rtol=0, atol=5.1e-7)
        assert scheduler.timesteps.tolist() == list(timesteps[:steps]) and scheduler.num_inference_steps == steps
    assert scheduler.init_noise_sigma == sampler.sigmas[0]


@pytest.mark.parametrize("steps", [0, 5, 50])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(DitAccelError, match=names("num_inference_steps", 1, 4, steps)):
        FewStepScheduler(rcm(80).sigmas).set_timesteps(steps)


def walk(scheduler, x, velocity):
    for t in scheduler.timesteps:
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_constant_velocity_in_closed_form(steps):
    """The ODE ends at x - sigma_0 v. Of the SDE's steps the last alone is left: (1 - s) x0 + s noise - s v."""
    x, v = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    sampler = rcm(80, ode=True)
    scheduler = started(sampler, steps)
    # each of the steps rounds once, at most to the size of its terms
    bound = (2 * steps + 2) * torch.finfo(torch.float32).eps * float((x.abs() + v.abs()).max())
    assert (walk(scheduler, x, v).double() - (x.double() - sampler.sigmas[0] * v.double())).abs().max() <= bound

    scheduler = started(rcm(80), steps)
    scheduler.generator = torch.Generator().manual_seed(7)
    generator = torch.Generator().manual_seed(7)
    level, mean, noise = scheduler.sigmas.double(), x.double(), []
    for i in range(steps):
        mean = (1 - level[i + 1]) * (mean - level[i] * v.double())
        noise = [(1 - level[i + 1]) * term for term in noise]
        if i + 1 < steps:
            noise.append(level[i + 1] * torch.randn(x.shape, generator=generator).double())
    exact = mean + sum(noise)
    latent = walk(scheduler, x, v)
    size = float((x.abs() + v.abs()).max()) + sum(float(term.abs().max()) for term in noise)
    assert latent.dtype == torch.float32
    assert (latent.double() - exact).abs().max() <= (4 * steps + 2) * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("points", [2, 3, 5])
def test_minimax_h3_is_sampled_as_by_its_own_scheduler(points):
    """A call counts the 0 at the end, and the velocity points to the data; conditions are noised alike."""
    from diffusers import MiniMaxH3Scheduler

    sampler = h3((0.999, 0.749, 0.5, 0.25), 12.0)
    ours, theirs = started(sampler, points), MiniMaxH3Scheduler()
    theirs.set_timesteps(sigmas=[*sampler.sigmas[: points - 1], 0.0])
    x, v, noise = torch.randn(3, 2, 3, 5).unbind()
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=0)
    assert ours.num_inference_steps == theirs.num_inference_steps == points - 1
    # each step rounds a few numbers no larger than the latent, the velocity and their sum
    bound = 8 * points * torch.finfo(torch.float32).eps * float(x.abs().max() + v.abs().max())
    assert (walk(ours, x, v) - walk(theirs, x, v)).abs().max() <= bound
    assert (walk(started(sampler, points), x, v) - (x + sampler.sigmas[0] * v)).abs().max() <= bound
    noised = (known.scale_noise(x, 0.999, noise) for known in (ours, theirs))
    torch.testing.assert_close(*noised, rtol=0, atol=bound)


def test_the_latent_stays_in_float32():
    scheduler = started(rcm(80), 2)
    x = torch.randn(2, 3)
    out = scheduler.step(torch.randn(2, 3).bfloat16(), scheduler.timesteps[0], x).prev_sample
    assert out.dtype == torch.float32 and scheduler.step_index == 1


@torch.no_grad()
def by_hand(transformer, sampler, embeds):
    """The authors' loop, in the dtype of the embeddings, from float32 noise of seed 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, 2, 2, generator=generator).to(embeds) * sampler.sigmas[0]
    levels = [*sampler.sigmas, 0.0]
    for i, t in enumerate(started(sampler, len(sampler.sigmas)).timesteps):
        v = transformer(x, t.expand(1), embeds, return_dict=False)[0]
        x = (1 - levels[i + 1]) * (x - levels[i] * v)
        if levels[i + 1]:
            x = x + levels[i + 1] * torch.randn(x.shape, generator=generator)
    return x


@pytest.fixture
def pipe(wan_folder):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", [rcm(80), dmd((1000.0, 757.0, 522.0), 8)], ids=["rcm", "dmd"])
def test_a_pipeline_samples_as_the_authors_do(pipe, sampler):
    """Calls have the defaults; noise comes from the call's generator; a call's own arguments win."""
    kind, old, before = type(pipe), pipe.scheduler, copy.deepcopy(dict(pipe.config))
    call = {"num_inference_steps": len(sampler.sigmas), "guidance_scale": 1.0}
    undo, notes = few_steps.install(pipe, call, sampler)
    assert "guidance_scale=1.0" in notes[0] and "FewStepScheduler in place of FlowMatchEuler" in notes[1]
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default == 1.0
    latent = pipe("a circle", generator=torch.Generator().manual_seed(0), **SIZES).frames
    embeds, _ = pipe.encode_prompt("a circle", do_classifier_free_guidance=False, max_sequence_length=512)
    plain = by_hand(copy.deepcopy(pipe.transformer), sampler, embeds)
    exact = by_hand(copy.deepcopy(pipe.transformer).double(), sampler, embeds.double())
    assert_accurate("latents", latent, plain, exact)
    one = pipe("a circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0), **SIZES).frames
    assert len(pipe.scheduler.timesteps) == 1 and not torch.equal(one, latent)
    undo()
    assert type(pipe) is kind and pipe.scheduler is old and dict(pipe.config) == before


def test_a_scheduler_set_since_stays(pipe):
    undo, _ = few_steps.install(pipe, CALL, rcm(80))
    pipe.scheduler = replacement = FewStepScheduler()
    undo()
    assert pipe.scheduler is replacement


def test_the_boundary_of_two_transformers_is_restored(pipe):
    pipe.register_to_config(boundary_ratio=0.875)
    undo, _ = few_steps.install(pipe, {}, Sampler((0.9,), boundary_ratio=0.9))
    assert pipe.config.boundary_ratio == 0.9
    undo()
    assert pipe.config.boundary_ratio == 0.875
