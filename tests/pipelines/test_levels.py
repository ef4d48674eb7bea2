"""The table of levels: every row parses, plans, reaches kernels, and is what some case takes."""

import functools
import itertools

import pytest
from messages import names, says

import dit_accel
from dit_accel.caches.ratios import ASSUMED, mag_ratios
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.pipelines.levels import FAMILY_ROWS, FEW, FEW_STEPS, GAINS_FROM, GENERAL, LEVELS, Case, choose
from dit_accel.registry import get_families, get_method
from dit_accel.setting import Setting
from dit_accel.tokens import TokenGrid

ARCHS = "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"
LONG = {True: TokenGrid(21, 45, 80, text=77), False: TokenGrid(1, 132, 124, text=77)}
NAMES = {  # of published models, by family
    "wan": [
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "BlockCodec",
    ],
    "hunyuan_video": ["hunyuanvideo-community/HunyuanVideo"],
    "framepack": ["lllyasviel/FramePackI2V_HY"],
    "flux": ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Kontext-dev"],
    "qwen_image": ["Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit"],
}
ROWS = [row for rows in (*FAMILY_ROWS.values(), GENERAL, FEW_STEPS) for row in rows]


parse = functools.cache(Setting.parse)


def cases(family):
    for video, gpu, steps in itertools.product((True, False), (True, False), (None, 1, 2, FEW, FEW + 1, 12, 50)):
        at = GAINS_FROM[video, gpu]
        for tokens, model in itertools.product((1, at - 1, at, 120_000), ("", *NAMES.get(family, ()))):
            yield Case(family, (model,), video, tokens, steps, gpu)


@pytest.mark.parametrize("family", get_families())
def test_every_case_has_a_setting_that_its_length_and_steps_allow(family):
    for case, level in itertools.product(cases(family), LEVELS):
        row = choose(level, case)
        setting = parse(row.setting)
        sparse = setting.method != "dense"
        assert row.source and (row.level, setting.text) == (level, row.setting)
        if case.steps is not None and case.steps <= FEW:
            assert setting.cache is None and sparse == (case.long and case.steps > 1)
            assert not sparse or setting.schedule.dense_steps == 1
            assert setting.schedule.remark(case.steps) is None or not sparse
        else:
            assert setting.cache is not None
            assert case.long or not sparse
        if row not in FAMILY_ROWS.get(family, ()) and row.setting != "dense":
            assert f"not measured on the family {family}" in row.source and not row.gain


def test_every_row_is_what_some_case_takes():
    chosen = {
        (row.level, row.setting, row.models)
        for family in get_families()
        for case, level in itertools.product(cases(family), LEVELS)
        for row in [choose(level, case)]
    }
    assert {(row.level, row.setting, row.models) for row in ROWS} <= chosen


@pytest.mark.parametrize("text", sorted({row.setting for row in ROWS}))
def test_rows_plan_and_run_in_kernels(text):
    setting = Setting.parse(text)
    for grid in LONG.values():
        plan = setting.plan(grid)
        assert setting.method == "dense" or plan.bounds[0] < 0.5 * grid.tokens**2
        learned = get_method(setting.method).learned(setting.config) is not None
        assert not learned
        for arch in ARCHS if setting.method != "dense" else ():
            assert not any(choice.plain for choice in plan.implementation(arch)), (text, arch)


def test_magcache_comes_with_published_ratios_alone():
    """No general row has MagCache."""
    for family, models in NAMES.items():
        for model, level in itertools.product(sorted({*models} - {"BlockCodec"}), LEVELS):
            cache = Setting.parse(choose(level, Case(family, (model,), True, 1, 50, True)).setting).cache
            assert cache.name == "mag"
            known = mag_ratios(cache.config.get("mag_ratios"), (model,))
            assert known.cond != (ASSUMED,), model
    assert not any("cache=mag" in row.setting for row in GENERAL)


def test_the_embedded_model_takes_its_own_rows(tmp_path):
    from dit_accel.pipelines.demo import DEFAULTS, load_demo

    pipe = load_demo()
    texts = {}
    for level, (height, width) in itertools.product(LEVELS, ((192, 192), (224, 256))):
        with dit_accel.accelerate(pipe, level, height=height, width=width, steps=12) as accel:
            texts[level, height] = accel.setting.text
            (note,) = [note for note in accel.report().notes if note.startswith("level")]
            assert all(word in note for word in (level, accel.setting.text, "measured on the embedded model"))
    forecast = ",reuse=output,damping=0.6"
    lists = {"faithful": f"0x1x3x6x10{forecast}", "balanced": f"0x1x3x7{forecast}", "fast": "0x1x4"}
    for level, computed in lists.items():
        text = f"dense cache=steps:computed={computed}"
        assert texts[level, 192] == texts[level, 224] == text
    with dit_accel.accelerate(pipe, steps=12) as accel:  # at its own size
        assert accel.setting.text == texts["balanced", 192]
        assert f"{DEFAULTS.tokens:,} tokens" in accel.report().notes[0]
    with dit_accel.accelerate(pipe, steps=12, cache="none") as accel:
        assert accel.setting.text == "dense"


def test_a_level_is_of_a_pipeline_and_takes_a_size_alone(wan_folder, tiny_wan):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    with pytest.raises(DitAccelError, match=names("tau sol radial balanced steps")):
        dit_accel.accelerate(pipe, tau=1.5)
    with pytest.raises(DitAccelError, match=names("steps 0")):
        dit_accel.accelerate(pipe, "fast", steps=0)
    with pytest.raises(DitAccelError, match=names("Fast faithful balanced fast")):
        dit_accel.accelerate(pipe, "Fast")
    with pytest.raises(DitAccelError, match=names("WanTransformer3DModel balanced sol")):
        dit_accel.accelerate(tiny_wan())
    with dit_accel.accelerate(pipe, "faithful", frames=9, height=32, width=48, dense_layers=1) as accel:
        assert accel.setting.text == "dense dense_layers=1 cache=first-block:threshold=0.05"
        assert "general" in accel.report().notes[0] and "not measured on the family wan" in accel.report().notes[0]


def test_a_call_of_another_case_is_said_once_a_run(recwarn):
    from dit_accel.pipelines.demo import DEFAULTS, load_demo

    pipe, size = load_demo(), {"height": 64, "width": 80}
    pipe.set_progress_bar_config(disable=True)
    call = DEFAULTS.call() | size | {"num_frames": 3, "prompt": "a red circle", "output_type": "latent"}

    def warned():
        said = [str(warning.message) for warning in recwarn.list if warning.category is DitAccelWarning]
        recwarn.clear()
        return said

    with dit_accel.accelerate(pipe, frames=3, **size, steps=12):
        pipe(**call)
        assert warned() == []
        pipe(**call | {"num_inference_steps": 3})
        (message,) = warned()
        assert says(message, "steps=3 replace=True balanced")
    with dit_accel.accelerate(pipe, frames=3, **size, steps=3):
        assert says(*warned(), "balanced 3")  # that it changes nothing
        pipe(**call | {"num_inference_steps": 3})
        assert warned() == []
