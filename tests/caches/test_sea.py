"""SeaCache against its definition (arXiv:2602.18993): which steps it skips, and what it adds."""

import numpy as np
import pytest
import torch
from messages import names
from tiny_models import get, module, run

from dit_accel.caches.at_work import CacheAtWork, Moment
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.registry import get_families

FLOOR = 1e-16
BUDGET = 0.2
SHARES = (0.0, 0.2, 0.9, 1.1, 0.15, 0.1, 0.05, 0.6, 0.1, 0.1, 0.1, 0.1)  # the change of the latent before each step


def indicator(latent, sigma):
    """A latent [C, T, H, W] behind the filter of equation 7, whose gain has the mean 1."""
    gain, sigma = np.ones(()), np.clip(sigma, 1e-6, 1 - 1e-6)
    for size in latent.shape[1:]:
        clean = 1 / (np.abs(np.fft.fftfreq(size)) ** 3 + FLOOR)  # the power of clean signals at each frequency
        axis_gain = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + FLOOR)
        gain = np.multiply.outer(gain, axis_gain)
    return np.fft.ifftn(np.fft.fftn(latent, axes=(1, 2, 3)) * gain / gain.mean(), axes=(1, 2, 3)).real


def computed_steps(latents, sigmas):
    """The steps that run: the first and the last, behind two skipped ones, and where the change adds up to BUDGET."""
    indicators = [
        [indicator(sample, sigma) for sample in latent] for latent, sigma in zip(latents, sigmas, strict=True)
    ]
    computed, change, skipped = [0], 0.0, 0
    for step in range(1, len(latents)):
        pairs = zip(indicators[step], indicators[step - 1], strict=True)
        change += np.mean([np.abs(now - last).mean() / (np.abs(last).mean() + FLOOR) for now, last in pairs])
        if change >= BUDGET or step == len(latents) - 1 or skipped == 2:
            computed.append(step)
            change, skipped = 0.0, 0
        else:
            skipped += 1
    return computed


def with_conditioning(latent):
    """Behind the latent, channels that change much from step to step, and are no part of the output."""
    return torch.cat([latent, 100 * latent.roll(1, -1).sin()], 1)


HUNYUAN = {"image_condition_type": "token_replace", "guidance_embeds": False}
MODELS = {
    "wan": ("wan", lambda: module("wan").build(), lambda latent: latent),
    "wan, image to video": ("wan", lambda: module("wan").build(in_channels=8), with_conditioning),
    "chronoedit": ("wan", lambda: module("wan").build_chronoedit(), lambda latent: latent),
    "hunyuan_video": ("hunyuan_video", lambda: module("hunyuan_video").build(), lambda latent: latent),
    "hunyuan_video, first frame": ("hunyuan_video", lambda: module("hunyuan_video").build(**HUNYUAN), lambda x: x),
}


@pytest.mark.parametrize("name", MODELS)
def test_sea_follows_its_definition(name):
    """Skipped steps add, bit for bit, what a line through the residuals of the last two computed steps says."""
    family, build, condition = MODELS[name]
    transformer, call = build(), module(family).inputs()
    ends = {}
    (_, first, _), *_, (_, last, _) = get_families()[family].stack_of(transformer).blocks(transformer)
    first.register_forward_pre_hook(lambda block, args: ends.update(start=args[0]))
    last.register_forward_hook(
        lambda block, args, output: ends.update(end=output[0] if isinstance(output, tuple) else output)
    )
    latent, calls = call["hidden_states"], []
    for step, share in enumerate(SHARES):
        latent = latent + share * call["hidden_states"].flip(0).roll(step, -1)
        calls.append(call | {"hidden_states": latent})
    sigmas = [1 - step / len(calls) for step in range(len(calls))]
    computed = computed_steps([call["hidden_states"].double().numpy() for call in calls], sigmas)
    assert 3 < len(computed) < len(calls) - 2

    cache = CacheAtWork("transformer", transformer, get_families()[family], StepCache.parse(f"sea:threshold={BUDGET}"))
    cache.attach()
    residuals = {}
    for step, (call, sigma) in enumerate(zip(calls, sigmas, strict=True)):
        cache.begin(Moment("run", step, len(calls), 1000 * sigma, sigma))
        run(transformer, call | {"hidden_states": condition(call["hidden_states"])})
        if step in computed:
            residuals[step] = ends["end"] - ends["start"]
            continue
        *before, newest = residuals
        added = residuals[newest]
        if before:
            slope = (step - newest) / (newest - before[-1])
            added = added + (added - residuals[before[-1]]) * slope
        assert torch.equal(ends["end"], ends["start"] + added), step
    cache.detach()


def test_a_model_without_such_a_latent_is_refused():
    """Between VACE's blocks hints are added; LTX-Video's latent is a sequence."""
    for name in ("wan:vace", "ltx:t2v", "cogvideox:1.0"):
        tiny = get(*name.split(":"))
        with pytest.raises(DitAccelError, match=names("sea", "first-block", "mag", "taylorseer", "steps")):
            CacheAtWork("transformer", tiny.shared, get_families()[tiny.family], StepCache.parse("sea")).attach()
