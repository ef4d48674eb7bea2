"""Step caches in every family: the answer of a skipped call, Diffusers' own bits, guidance branches, exact removal."""

import functools
import inspect

import pytest
import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from messages import names
from tiny_models import all_models, get, run

from dit_accel.caches.at_work import CacheAtWork, Moment
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.registry import get_families

CALLS = 5
CACHES = {
    "first-block": StepCache.parse("first-block:threshold=1e9"),
    "mag": StepCache.parse("mag:threshold=9,mag_ratios=1.0,retention_ratio=0.2"),
    "taylorseer": StepCache.parse(
        "taylorseer:cache_interval=4,disable_cache_before_step=2,taylor_factors_dtype=float64"
    ),
    "steps": StepCache.parse("steps:computed=0x1x3"),  # forecasts have calls that differ, below
}
# CI runs two caches a model, the other two for the next model.
MODELS_AND_CACHES = [
    pytest.param(tiny, cache, id=f"{tiny}-{cache}", marks=[pytest.mark.thorough] if (index + turn) % 2 else [])
    for index, tiny in enumerate(all_models())
    for turn, cache in enumerate(CACHES)
]


def at_work(transformer, tiny, cache):
    return CacheAtWork("transformer", transformer, get_families()[tiny.family], cache)


class LayerCount:
    """Counts the self-attention layers that run in a call."""

    def __init__(self, transformer, tiny):
        attentions = [module for _, module in get_families()[tiny.family].attentions(transformer)]
        self.ran, self.layers = 0, len(attentions)
        # a cache may replace what an attention module answers, and its forward hooks are called all the same
        parts = [getattr(attention, "to_q", attention) for attention in attentions]
        self.handles = [part.register_forward_pre_hook(self.add) for part in parts]

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def add(self, module, args):
        self.ran += 1

    def take(self):
        ran, self.ran = self.ran, 0
        return ran, self.layers


def run_steps(transformer, calls, cache, count=None):
    """Outputs of these calls, one in each step, led and recorded by the cache."""
    outputs = []
    for step, call in enumerate(calls):
        cache.begin(Moment("run", step, len(calls), 1000 - step, 1 - step / len(calls)))
        outputs.append(run(transformer, call))
        if count is not None:
            cache.count(*count.take())
    return outputs


class Ends:
    """What the first block took and the last one returned in the last call: both streams, None where there is none.

    Args:
        behind_first: what the first block returned, in place of what it took.
        rounded: the last block returns the sum of that and of the difference to it.
    """

    def __init__(self, transformer, tiny, behind_first=False, rounded=False):
        stack = get_families()[tiny.family].stack_of(transformer)
        (_, first, taken), *_, (_, last, returned) = stack.blocks(transformer)
        self.stack, self.streams = stack, [stack.visual, *(name for name in taken if name != stack.visual)]
        self.taken, self.returned = {}, {}
        names = list(inspect.signature(type(first).forward).parameters)[1:]

        def before(module, args, kwargs):
            self.taken = dict(zip(names, args, strict=False)) | kwargs

        def behind(module, args, output):
            self.taken = dict(zip(taken, output if len(taken) > 1 else (output,), strict=True))

        def after(module, args, output):
            self.returned = dict(zip(returned, output if len(returned) > 1 else (output,), strict=True))
            if not rounded:
                return output
            for name, (start, end) in zip(self.streams, self.pairs(), strict=False):
                self.rows(self.returned[name], start).copy_(start + (end - start))
            return output

        self.handles = [last.register_forward_hook(after)]
        if behind_first:
            self.handles.append(first.register_forward_hook(behind))
        else:
            self.handles.append(first.register_forward_pre_hook(before, with_kwargs=True))

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def rows(self, end, start):
        """The image's, where the last block sees text and image as one sequence."""
        tokens = start.shape[1]
        return end[:, :tokens] if self.stack.image_first else end[:, end.shape[1] - tokens :]

    def pairs(self):
        """Streams that a skipped call makes: what the first block took, and what the last one returned."""
        names = self.streams if self.stack.both else self.streams[:1]
        pairs = [(self.taken[name], self.returned[name]) for name in names if self.returned.get(name) is not None]
        return [(start, self.rows(end, start).clone()) for start, end in pairs]


@pytest.mark.check("step caches")
@pytest.mark.parametrize(("tiny", "cache"), MODELS_AND_CACHES)
def test_a_skipped_call_with_the_same_input_has_the_same_answer(tiny, cache, evidence):
    """But for two roundings, bit for bit: what was taken away from the last block's output is added.

    TaylorSeer predicts the outputs themselves. Then the cache is taken off, and every module is as it was. Some models
    cache positions of their own.
    """
    transformer, call = tiny.shared_double, tiny.double_call()
    plain = run(transformer, call)
    ends = Ends(transformer, tiny, behind_first=cache == "first-block", rounded=cache != "taylorseer")
    expected = run(transformer, call)
    ends.remove()
    before = {name: dict(vars(module)) for name, module in transformer.named_modules()}
    count, at = LayerCount(transformer, tiny), at_work(transformer, tiny, CACHES[cache])
    at.attach()
    outputs = run_steps(transformer, [call] * CALLS, at, count)
    at.detach()
    count.remove()
    report = at.report()
    (branch,) = report.branches
    assert report.skipped and report.computed + report.skipped == CALLS and report.kept_bytes > 0
    for step, output in enumerate(outputs):
        assert torch.equal(output, plain if branch.steps[step] == 1 else expected), step
    evidence(report)
    assert {name: dict(vars(module)) for name, module in transformer.named_modules()} == before
    assert torch.equal(run(transformer, call), plain)


# Where Diffusers 0.42.1 has the cache and its answer is right.
SERVED = ("cogvideox:1.0", "cogview:cogview4", "flux:t2i", "framepack:i2v", "hunyuan_image:glyphs", "hunyuan_video:i2v")
SERVED += ("ltx:condition", "mochi:t2v", "pixart:t2i", "qwen_image:edit", "wan:t2v")
APPLY = {
    "first-block": ("first-block:threshold=0.2", hooks.apply_first_block_cache, SERVED),
    "mag": (
        "mag:threshold=0.12,mag_ratios=0.98,num_inference_steps=6",
        hooks.apply_mag_cache,
        (*SERVED, "flux2:edit", "sd3:t2i", "kandinsky5:t2v"),
    ),
    "taylorseer": (
        "taylorseer:cache_interval=3,disable_cache_before_step=2",
        hooks.apply_taylorseer_cache,
        (*SERVED, "allegro:t2v", "cosmos:2.5", "flux:chroma", "joyimage:edit", "wan:vace"),
    ),
}
COMPARED = [
    pytest.param(get(*name.split(":")), cache, id=f"{name}-{cache}") for cache in APPLY for name in APPLY[cache][2]
]


def growing(tiny, calls=6):
    """Calls whose latents differ."""
    call = tiny.call()
    return [call | {"hidden_states": call["hidden_states"] * (1 + step / 20)} for step in range(calls)]


@pytest.mark.parametrize(("tiny", "cache"), COMPARED)
def test_bits_are_those_of_diffusers_own_cache(tiny, cache):
    text, apply, _ = APPLY[cache]
    settings, calls, theirs, ours = StepCache.parse(text), growing(tiny), tiny.build(), tiny.build()
    apply(theirs, settings.build(**({"mag_ratios": torch.full((6,), 0.98)} if cache == "mag" else {})))
    expected = []
    for call in calls:
        _set_cache_context(theirs, CacheContext("cond"))
        expected.append(run(theirs, call))
    at = at_work(ours, tiny, settings)
    at.attach()
    assert all(map(torch.equal, run_steps(ours, calls, at), expected))
    assert not all(map(torch.equal, [run(tiny.shared, call) for call in calls], expected))
    at.detach()


GUIDED = ("first-block:threshold=0.2", "mag:threshold=0.12", "taylorseer:cache_interval=3,disable_cache_before_step=2")
GUIDED += ("steps:computed=0x1x3,damping=0.5", "steps:computed=0x1x3,reuse=output,damping=0.5")
PAB = "pab:spatial_attention_block_skip_range=2,spatial_attention_timestep_skip_range=-1x1001"


@pytest.mark.parametrize(
    ("text", "named"), [*((text, named) for text in GUIDED for named in (False, True)), (PAB, False)]
)
def test_guidance_branches_are_cached_apart(text, named):
    """Two calls a step, with a pipeline's `cache_context` or without one, are two runs of one call."""
    tiny = get("wan", "t2v")
    transformer, calls = tiny.build(), growing(tiny)
    others = [call | {"encoder_hidden_states": -2 * call["encoder_hidden_states"]} for call in calls]
    alone = []
    for branch in (calls, others):
        at = at_work(transformer, tiny, StepCache.parse(text))
        at.attach()
        alone.append(run_steps(transformer, branch, at))
        at.detach()
    count, at = LayerCount(transformer, tiny), at_work(transformer, tiny, StepCache.parse(text))
    at.attach()
    for run_id in ("one", "two"):  # what the first run kept is forgotten
        for step, pair in enumerate(zip(calls, others, strict=True)):
            for branch, call in enumerate(pair):
                if named:
                    _set_cache_context(transformer, CacheContext(("cond", "uncond")[branch]))
                at.begin(Moment(run_id, step, len(calls), 1000 - step))
                assert torch.equal(run(transformer, call), alone[branch][step])
                at.count(*count.take())
                if named:
                    _set_cache_context(transformer, None)
    report = at.report()
    assert [branch.branch for branch in report.branches] == (["cond", "uncond"] if named else ["call 0", "call 1"])
    assert report.branches[0].skipped == report.branches[1].skipped > 0
    assert sorted(report.branches[0].steps) == list(range(6))
    at.detach()


def test_sea_skips_on_wan_with_the_schedulers_sigma():
    """Wan's pipelines name the branch alone; SeaCache needs the step and its noise level too."""
    tiny = get("wan", "t2v")
    transformer, calls = tiny.build(), growing(tiny)
    count, at = LayerCount(transformer, tiny), at_work(transformer, tiny, StepCache.parse("sea:threshold=9"))
    at.attach()
    run_steps(transformer, calls, at, count)
    assert at.report().skipped > 0
    at.detach()


@pytest.mark.parametrize("name", ["wan:t2v", "flux:t2i", "sd3:t2i", "ltx2:2.0"])
@pytest.mark.parametrize("counted", [True, False])
def test_chosen_steps_run_and_the_others_reuse_the_last_residual(name, counted):
    """The outputs are MagCache's where its ratios say the same; the number of steps may be unknown."""
    tiny = get(*name.split(":"))
    transformer, calls, computed = tiny.build(), growing(tiny), (0, 1, 4)
    outputs = {}
    ratios = "x".join("9" if step in computed else "1" for step in range(6))
    for text in ("steps:computed=0x1x4", f"mag:threshold=1,max_skip_steps=6,retention_ratio=0,mag_ratios={ratios}"):
        at = at_work(transformer, tiny, StepCache.parse(text))
        count = LayerCount(transformer, tiny)
        at.attach()
        rows = []
        for step, call in enumerate(calls):
            at.begin(Moment("run", step, 6 if counted or text.startswith("mag") else None, 1000 - step, 1 - step / 6))
            rows.append(run(transformer, call))
            at.count(*count.take())
        at.detach()
        count.remove()
        outputs[text] = rows
        (branch,) = at.report().branches
        assert {step for step, share in branch.steps.items() if share == 1} == set(computed)
    assert all(map(torch.equal, *outputs.values()))


@pytest.mark.parametrize("reuse", ["residual", "output"])
@pytest.mark.parametrize(("name", "streams"), [("wan:t2v", 1), ("flux:t2i", 1), ("flux2:edit", 1), ("ltx2:2.0", 2)])
def test_a_forecast_goes_on_along_a_damped_trend(name, streams, reuse):
    """Bit for bit the formula, of dense calls: in steps of uneven distance, in both streams where both are outputs.

    Behind the first step alone the last one is reused; a second run does not know the first.
    """
    tiny = get(*name.split(":"))
    transformer, calls, computed, damping = tiny.build(), growing(tiny, 8), [0, 2, 3], 0.5
    ends = Ends(transformer, tiny)
    dense = []
    for call in calls:
        run(transformer, call)
        dense.append(ends.pairs())
    assert all(len(pairs) == streams for pairs in dense)
    left = [[end if reuse == "output" else end - start for start, end in pairs] for pairs in dense]
    text = f"steps:computed=0x2x3,reuse={reuse},damping={damping}"
    at = at_work(transformer, tiny, StepCache.parse(text))
    at.attach()
    for run_id in ("one", "two"):
        for step, call in enumerate(calls):
            at.begin(Moment(run_id, step, len(calls), 1000 - step))
            run(transformer, call)
            past = [number for number in computed if number <= step]
            for stream, (start, end) in enumerate(ends.pairs()):
                expected = left[past[-1]][stream]
                if len(past) > 1 and step > past[-1]:
                    trend = (expected - left[past[-2]][stream]) / (past[-1] - past[-2])
                    expected = expected + sum(damping**power for power in range(1, step - past[-1] + 1)) * trend
                if step in computed:
                    expected = dense[step][stream][1]
                elif reuse == "residual":
                    expected = start + expected
                assert torch.equal(end, expected), (run_id, step, stream)
    at.detach()
    ends.remove()


def test_a_trend_counts_among_the_bytes_that_are_kept():
    tiny = get("wan", "t2v")
    transformer, calls, kept_bytes = tiny.build(), growing(tiny), {}
    ends = Ends(transformer, tiny)
    for text in ("steps:computed=0x1x3", "steps:computed=0x1x3,damping=0.5"):
        count, at = LayerCount(transformer, tiny), at_work(transformer, tiny, StepCache.parse(text))
        at.attach()
        run_steps(transformer, calls, at, count)
        kept_bytes[text] = at.report().kept_bytes
        at.detach()
    plain, damped = kept_bytes.values()
    assert damped - plain == ends.pairs()[0][1].nbytes > 0


def test_a_hook_set_above_the_cache_stays():
    from diffusers.hooks import HookRegistry, ModelHook

    tiny = get("wan", "t2v")
    transformer = tiny.build()
    at = at_work(transformer, tiny, CACHES["mag"])
    at.attach()
    block = transformer.blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "theirs")
    outer = transformer.blocks[1].forward = functools.partial(transformer.blocks[1].forward)  # as offloading does
    at.detach()
    assert list(block._diffusers_hook.hooks) == ["theirs"] and transformer.blocks[1].forward is outer
    assert torch.equal(run(transformer, tiny.call()), tiny.dense)


@pytest.mark.parametrize("enable", [True, False])
def test_a_cache_of_the_users_stays(enable):
    tiny = get("wan", "t2v")
    transformer = tiny.build()
    config = hooks.FirstBlockCacheConfig(0.1)
    transformer.enable_cache(config) if enable else hooks.apply_first_block_cache(transformer, config)
    with pytest.raises(DitAccelError, match="stays the user's"):
        at_work(transformer, tiny, CACHES["mag"])


def test_a_second_cache_of_the_users_is_refused_by_diffusers():
    tiny = get("wan", "t2v")
    transformer = tiny.build()
    at = at_work(transformer, tiny, CACHES["mag"])
    at.attach()
    with pytest.raises(ValueError, match="already been enabled"):
        transformer.enable_cache(hooks.FirstBlockCacheConfig(0.1))
    transformer.disable_cache()  # the user takes ours off
    at.detach()
    assert not transformer.is_cache_enabled and torch.equal(run(transformer, tiny.call()), tiny.dense)


def test_a_number_of_steps_that_differs_is_refused_before_the_first():
    tiny = get("wan", "t2v")
    at = at_work(tiny.build(), tiny, StepCache.parse("mag:num_inference_steps=28"))
    at.attach()
    with pytest.raises(DitAccelError, match=names("num_inference_steps=28", 12)):
        at.begin(Moment("run", 0, 12))
    with pytest.raises(DitAccelError, match="needs the step"):
        at.begin(Moment())
    at.detach()
    chosen = at_work(tiny.build(), tiny, StepCache.parse("steps:computed=0x5,num_inference_steps=6"))
    chosen.attach()
    with pytest.raises(DitAccelError, match=names(4)):
        chosen.begin(Moment("run", 0, 4))


@pytest.mark.parametrize(("name", "text"), [("flux:t2i", "sea"), ("ltx:t2v", "taylorseer:use_lite_mode=false")])
def test_what_a_model_cannot_have_is_refused_and_leaves_nothing(name, text):
    tiny = get(*name.split(":"))
    transformer = tiny.build()
    before = {key: dict(vars(module)) for key, module in transformer.named_modules()}
    at = at_work(transformer, tiny, StepCache.parse(text))
    with pytest.raises(DitAccelError, match=names("first-block", "mag", "taylorseer", "steps")):
        at.attach()
    assert {key: dict(vars(module)) for key, module in transformer.named_modules()} == before
