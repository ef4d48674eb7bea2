"""Step caches through `accelerate`: with methods, pipelines, compiling, adapters, offloading; saved and undone."""

import json

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MagCacheConfig, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from messages import names
from tiny_models import get, run

import dit_accel
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.registry import get_families
from dit_accel.setting import Setting

STEPS = 6
MAG = "mag:threshold=0.12"
WINDOW = {"window": (3, 5, 4)}


@pytest.fixture
def wan_pipe(tiny_wan):
    def make(**components):
        components = {"transformer": tiny_wan()} | components
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generate(pipe, steps=STEPS, guidance=3.0):
    text = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(2))
    negative = {"negative_prompt_embeds": text[1]} if guidance > 1 else {}
    return pipe(
        prompt_embeds=text[0], height=80, width=112, num_frames=9, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0), output_type="latent", **negative,
    ).frames  # fmt: skip


THEIRS = {
    "mag:threshold=0.12,mag_ratios=0.98": lambda: MagCacheConfig(
        0.12, num_inference_steps=STEPS, mag_ratios=torch.full((STEPS,), 0.98)
    ),
    "first-block:threshold=0.3": lambda: FirstBlockCacheConfig(0.3),
}


@pytest.mark.parametrize("text", THEIRS)
def test_a_cache_alone_has_the_bits_of_diffusers_own(text, wan_pipe):
    """In two runs, guided, with Diffusers' own contexts; the number of steps follows the scheduler."""
    pipe = wan_pipe()
    dense = generate(pipe)
    pipe.transformer.enable_cache(THEIRS[text]())
    theirs = generate(pipe)
    pipe.transformer.disable_cache()
    with dit_accel.accelerated(pipe, "dense", cache=text) as accel:
        assert torch.equal(generate(pipe), theirs) and torch.equal(generate(pipe), theirs)
        generate(pipe, steps=4)
        report = accel.report()
    assert not torch.equal(theirs, dense) and torch.equal(generate(pipe), dense)
    assert [branch.branch for branch in report.cache.branches] == ["cond", "uncond"]
    assert report.cache.skipped > 0 and report.cache.computed + report.cache.skipped == report.calls["transformer"]
    assert [list(branch.steps) for branch in report.cache.branches] == [[0, 1, 2, 3]] * 2
    record = json.loads(json.dumps(report.as_dict()))
    assert (
        record["cache"]["skipped"] == report.cache.skipped and record["setting"]["cache"]["name"] == text.split(":")[0]
    )
    assert "skipped" in str(report) and report.cache.kept_bytes > 0


def test_dense_steps_count_steps_whether_computed_or_skipped(wan_pipe):
    """Two dense steps of six: MagCache skips the second, and the third is sparse."""
    pipe = wan_pipe()
    cache = "mag:threshold=9,mag_ratios=1.0,retention_ratio=0,max_skip_steps=1"
    with dit_accel.accelerated(pipe, "gna", dense_steps=2, cache=cache, **WINDOW) as accel:
        generate(pipe)
        report = accel.report()
    assert list(report.cache.branches[0].steps.values()) == [1, 0, 1, 0, 1, 0]
    for layer in report.layers:
        assert layer.dense_reasons == {"dense_steps=2": 2} and layer.sparse_calls == 4


def test_two_transformers_on_one_trajectory(wan_pipe, tiny_wan):
    """Each knows the step within the whole: the second begins where the first ends, with a computed call."""
    pipe = wan_pipe(transformer_2=tiny_wan(), boundary_ratio=0.8)
    with dit_accel.accelerated(pipe, "gna", cache="mag:threshold=9,mag_ratios=1.0", **WINDOW) as accel:
        generate(pipe, steps=8)
        branches = accel.report().cache.branches
    steps = [step for branch in branches if branch.branch == "cond" for step in branch.steps]
    assert {branch.transformer for branch in branches} == {"transformer", "transformer_2"} and steps == list(range(8))
    for branch in branches:
        assert next(iter(branch.steps.values())) == 1


@pytest.mark.parametrize("share", ["residual", "output"])
def test_shared_results_with_a_cache(share, wan_pipe):
    """A skipped refresh happens at the next computed step, and nothing is kept behind a last step that is skipped."""
    pipe = wan_pipe()
    cache = "mag:threshold=9,mag_ratios=1.0,retention_ratio=0,max_skip_steps=2"
    with dit_accel.accelerated(pipe, "gna", share=share, refresh=3, cache=cache, **WINDOW) as accel:
        generate(pipe)  # computes steps 0 and 3, each three steps after the last refresh
        report = accel.report()
        assert list(report.cache.branches[0].steps.values()) == [1, 0, 0, 1, 0, 0]
        assert all(layer.step_density[3] >= 1 for layer in report.layers)
        assert not any(layer.ours.stored for engine in accel._engines for layer in engine.layers)
        assert accel._engines[0].cache.size == 0


def test_a_cache_that_was_put_on_in_a_pause_stays(wan_pipe):
    """Ours stays off with a note, and the method goes on."""
    pipe = wan_pipe()
    accel = dit_accel.accelerate(pipe, "gna", cache=MAG, **WINDOW)
    generate(pipe)
    with pytest.warns(DitAccelWarning, match=names(MAG, "disable_cache")):
        with accel.paused():
            pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    generate(pipe)
    report = accel.report()
    assert all(layer.sparse_calls for layer in report.layers)
    assert sum(branch.computed + branch.skipped for branch in report.cache.branches) == 2 * STEPS
    accel.remove()
    assert pipe.transformer.is_cache_enabled


def test_saved_loaded_replaced_paused_and_undone(wan_pipe, tmp_path):
    pipe = wan_pipe()
    dense = generate(pipe)
    modules = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    accel = dit_accel.accelerate(pipe, "gna", cache=MAG, dense_steps=1, **WINDOW)
    cached = generate(pipe)
    accel.save_pretrained(tmp_path)
    with accel.paused():
        assert torch.equal(generate(pipe), dense)
    assert torch.equal(generate(pipe), cached)
    with pytest.raises(DitAccelError, match="already accelerated"):
        dit_accel.accelerate(pipe, "gna", **WINDOW)
    dit_accel.accelerate(pipe, "gna", cache="taylorseer:cache_interval=2", replace=True, **WINDOW).remove()
    accel.remove()
    assert torch.equal(generate(pipe), dense)
    loaded = dit_accel.load(pipe, tmp_path)
    assert loaded.setting == accel.setting and str(loaded.setting.cache) == MAG
    assert torch.equal(generate(pipe), cached)
    loaded.remove()
    assert {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()} == modules


@pytest.mark.parametrize("when", ["inside", "before"])
def test_a_pause_that_outlasts_the_accelerator_puts_nothing_back(when, wan_pipe):
    """Neither the step cache nor the back end of dense steps."""
    pipe = wan_pipe()
    dense = generate(pipe)
    modules = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    accel = dit_accel.accelerate(pipe, "gna", cache=MAG, dense_steps=1, dense_backend="_native_math", **WINDOW)
    if when == "before":
        accel.remove()
    with accel.paused():
        accel.remove()
    assert {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()} == modules
    assert {processor._attention_backend for processor in pipe.transformer.attn_processors.values()} == {None}
    assert torch.equal(generate(pipe), dense)


@pytest.mark.parametrize("cache", [MAG, "steps:computed=0x2"])
def test_a_cache_that_the_user_takes_off_is_not_reported_as_at_work(cache, wan_pipe):
    pipe = wan_pipe()
    dense = generate(pipe)
    accel = dit_accel.accelerate(pipe, "dense", cache=cache)
    generate(pipe)
    before = accel.report().cache
    pipe.transformer.disable_cache()
    with pytest.warns(DitAccelWarning, match=names(cache, "disable_cache")) as said:
        assert torch.equal(generate(pipe), dense)
    assert len(said) == 1
    after = accel.report().cache
    assert (after.computed, after.skipped, after.branches) == (before.computed, before.skipped, before.branches)
    assert [note for note in after.notes if note not in before.notes]
    accel.remove()
    with dit_accel.accelerated(pipe, "dense", cache=cache) as accel:
        generate(pipe)
        assert accel.report().cache.skipped


def test_what_cannot_work_changes_nothing(wan_pipe):
    pipe = wan_pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    with pytest.raises(DitAccelError, match="stays the user's"):
        dit_accel.accelerate(pipe, "gna", cache=MAG, **WINDOW)
    assert pipe.transformer.is_cache_enabled
    pipe.transformer.disable_cache()
    with (
        dit_accel.accelerated(pipe, "gna", cache="mag:num_inference_steps=28", **WINDOW) as accel,
        pytest.raises(DitAccelError, match="num_inference_steps=28"),
    ):
        generate(pipe)
    assert accel.report().sparse_calls == 0
    with pytest.raises(DitAccelError, match=names("'threshold'")):
        dit_accel.accelerate(pipe, "gna", cache="mag:treshold=1", **WINDOW)


def test_calibration_measures_what_diffusers_measures(wan_pipe, capsys):
    pipe = wan_pipe()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    plain = generate(pipe)
    pipe.transformer.disable_cache()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    with dit_accel.accelerated(pipe, "dense", cache="mag:calibrate=true") as accel:
        assert torch.equal(generate(pipe), plain)
        ratios = accel.report().cache.ratios["transformer"]
    assert [ratios["cond"], ratios["uncond"]] == printed and capsys.readouterr().out == ""


def test_the_setting_holds_the_cache():
    setting = Setting.parse("gna:window=3x5x4 dense_steps=2 cache=mag:threshold=0.12,max_skip_steps=4")
    assert setting.text == "gna:window=3x5x4 dense_steps=2 cache=mag:threshold=0.12,max_skip_steps=4"
    assert Setting.from_dict(json.loads(json.dumps(setting.as_dict()))) == setting == Setting.parse(setting.text)
    assert setting.changed(cache="sea").cache.name == "sea" and setting.changed(dense_steps=1).cache == setting.cache
    assert Setting.make("gna", WINDOW, cache=setting.cache).cache == setting.cache


@pytest.mark.parametrize(("words", "dense"), [({}, 1), ({"dense_layers": 0}, 0), ({"dense_layers": (1,)}, (1,))])
def test_first_block_decides_by_a_dense_layer(words, dense):
    setting = Setting.make("gna", WINDOW, cache="first-block", **words)
    assert setting.schedule.dense_layers == dense and Setting.parse(setting.text) == setting
    assert Setting.make("dense", cache="first-block").schedule.dense_layers == 0
    assert Setting.make("gna", WINDOW, cache="mag").schedule.dense_layers == 0


def test_few_steps(wan_pipe):
    """Four steps, as distilled models take: a share of dense steps is one step at least; a cache says what it did."""
    pipe = wan_pipe()
    with dit_accel.accelerated(pipe, "gna", dense_steps=0.1, cache="mag:threshold=0.01", **WINDOW) as accel:
        generate(pipe, steps=4, guidance=1.0)
        report = accel.report()
    assert report.cache.skipped == 0 and "it skipped nothing" in str(report)
    assert all((layer.dense_calls, layer.sparse_calls) == (1, 3) for layer in report.layers)
    with dit_accel.accelerated(pipe, "gna", dense_steps=0.1, cache="mag:threshold=0.05", **WINDOW) as accel:
        generate(pipe, steps=4, guidance=1.0)
        assert accel.report().cache.skipped == 2


# One of each kind of stack: one stream, two, two and then two, two and then one, and text first.
KINDS = {
    "wan:t2v": "mag:threshold=0.05",
    "cogvideox:1.0": "first-block:threshold=0.3",
    "flux:t2i": "steps:computed=0x2,damping=0.5",
}
KINDS |= {"flux2:t2i": "first-block:threshold=0.3", "qwen_image:t2i": "taylorseer:cache_interval=2"}


def cached_run(transformer, tiny, cache, before=None, after=None):
    """Outputs of some steps; `after` changes the transformer behind `accelerate`."""
    window = {"window": (3, 5, 4) if tiny.video else (1, 5, 4)}
    with dit_accel.accelerated(transformer, "gna", cache=cache, **window) as accel:
        if after is not None:
            after(transformer)
        outputs = []
        for step in range(4):
            accel.set_step(step, 4)
            call = tiny.call()
            outputs.append(run(transformer, call | {"hidden_states": call["hidden_states"] * (1 + step / 20)}))
        assert 0 < accel.report().cache.skipped < 4
    return torch.stack(outputs)


@pytest.mark.parametrize(("name", "cache"), KINDS.items())
def test_with_compiled_blocks_adapters_and_offloading(name, cache, tmp_path):
    tiny = get(*name.split(":"))
    plain = cached_run(tiny.build(), tiny, cache)

    def offload(transformer):
        accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))

    assert torch.equal(cached_run(tiny.build(), tiny, cache, after=offload), plain)
    transformer = tiny.build()
    offload(transformer)
    assert torch.equal(cached_run(transformer, tiny, cache), plain)

    def by_group(transformer, kind="leaf_level", **sizes):
        cpu, disk = torch.device("cpu"), str(tmp_path / kind)
        apply_group_offloading(
            transformer, onload_device=cpu, offload_device=cpu, offload_type=kind, offload_to_disk_path=disk, **sizes
        )

    assert torch.equal(cached_run(tiny.build(), tiny, cache, after=by_group), plain)
    transformer = tiny.build()
    by_group(transformer, "block_level", num_blocks_per_group=1)
    assert torch.equal(cached_run(transformer, tiny, cache), plain)

    def compile_blocks(transformer):
        for _, block, _ in get_families()[tiny.family].stack.blocks(transformer):
            block.compile(backend="eager")

    assert torch.equal(cached_run(tiny.build(), tiny, cache, after=compile_blocks), plain)

    def add_adapter(transformer):
        from peft import LoraConfig

        torch.manual_seed(5)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))

    adapted = tiny.build()
    add_adapter(adapted)
    before = cached_run(adapted, tiny, cache)
    assert torch.equal(cached_run(tiny.build(), tiny, cache, after=add_adapter), before)
    assert not torch.equal(before, plain)
