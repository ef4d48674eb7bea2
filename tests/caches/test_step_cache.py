"""The text and JSON forms of a step cache, what is refused, and MagCache's ratios."""

import dataclasses
import json

import pytest
import torch
from diffusers import hooks
from messages import names, says

from dit_accel.caches.ratios import ASSUMED, MagRatios, mag_ratios, published
from dit_accel.caches.record import BranchReport, spans
from dit_accel.caches.step_cache import CONFIGS, ChosenSteps, StepCache
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.levels import FAMILY_ROWS, is_named

TEXTS = (
    "first-block",
    "first-block:threshold=0.2",
    "mag:threshold=0.12,max_skip_steps=4,mag_ratios=1.0x0.98x0.97",
    "mag:mag_ratios=0.98",
    "mag:mag_ratios=wan2.1-t2v-1.3b",
    "taylorseer:cache_interval=2,taylor_factors_dtype=float32",
    "sea:threshold=0.5,residual_order=0",
    "faster:spatial_attention_timestep_skip_range=-1x681,is_guidance_distilled=True",
    "pab:spatial_attention_block_skip_range=2",
    "steps:computed=0x1x3,num_inference_steps=6",
    "steps:computed=0x1x3,reuse=output,damping=0.5",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_json_read_back(text):
    cache = StepCache.parse(text)
    assert str(cache) == text and StepCache.parse(str(cache)) == cache
    assert StepCache.of(json.loads(json.dumps(cache.as_dict()))) == cache
    assert StepCache.of(cache) is cache and StepCache.of(None) is StepCache.of("none") is None
    assert len({cache, StepCache.of(text)}) == 1


def test_configs_are_diffusers_own():
    theirs = {kind for name, kind in CONFIGS.items() if name != "steps"}
    assert theirs | {"TextKVCacheConfig"} == {
        name for name in dir(hooks) if name.endswith(("CacheConfig", "BroadcastConfig"))
    }
    built = StepCache.parse("taylorseer:taylor_factors_dtype=float32,cache_interval=2").build()
    assert built == hooks.TaylorSeerCacheConfig(2, taylor_factors_dtype=torch.float32, use_lite_mode=True)
    assert StepCache.parse("first-block").build() == hooks.FirstBlockCacheConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magg", "Did you mean 'mag'"),
        ("mag:treshold=0.1", "Did you mean 'threshold'"),
        ("mag:calibrate=1", "calibrate"),
        ("pab:current_timestep_callback=1", "no setting"),
        ("mag:threshold=high", "threshold"),
        ("mag:threshold=-1", "threshold"),
        ("mag:threshold=nan", "threshold"),
        ("mag:max_skip_steps=0", "max_skip_steps"),
        ("first-block:threshold=true", "threshold"),
        ("taylorseer:cache_interval=0", "cache_interval"),
        ("taylorseer:taylor_factors_dtype=float33", "taylor_factors_dtype"),
        ("sea:residual_order=2", "residual_order"),
        ("steps", "computed=none computed=0x1x2x6"),
        ("steps:", "computed=none computed=0x1x2x6"),
        ("steps:computed=0", "computed 0 0x1x2"),
        ("steps:computed=1x2", "computed=1x2 computed=0x1x2x6"),
        ("steps:computed=0x3x2", "computed=0x3x2 computed=0x1x2x6"),
        ("steps:computed=0x1x1.5", "computed 1.5 0x1x2"),
        ("steps:computed=0x1,num_inference_steps=0", "num_inference_steps 0 1"),
        ("steps:computed=0x6,num_inference_steps=6", "computed=0x6 num_inference_steps=6 5"),
        ("steps:computed=0x1,damping=1.1", "damping=1.1 0 1"),
        ("steps:computed=0x1,damping=-0.1", "damping=-0.1 0 1"),
        ("steps:computed=0x1,damping=nan", "damping nan"),
        ("steps:computed=0x1,reuse=foo", "reuse 'foo' residual output"),
        ("mag:threshold", "key=value"),
        ("", "Unknown step cache"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line(text, said):
    with pytest.raises(DitAccelError) as error:
        StepCache.parse(text)
    assert says(str(error.value), said) and "\n" not in str(error.value)


@pytest.mark.parametrize("damping", [-0.1, 1.1, float("nan")])
def test_damping_is_from_0_to_1(damping):
    with pytest.raises(ValueError, match=names(f"damping={damping:g}")):
        ChosenSteps((0, 1), damping=damping)


def test_one_step_is_no_list():
    with pytest.raises(DitAccelError, match=names("computed=0", "computed=0x1x2x6")):
        StepCache("steps", {"computed": (0,)})


def test_a_step_cache_is_text_or_itself():
    with pytest.raises(DitAccelError, match="mag:threshold"):
        StepCache.of(3)
    with pytest.raises(DitAccelError, match="no setting 'kind'"):
        StepCache.of({"kind": "mag"})


def test_chosen_steps_are_for_runs_of_their_number():
    chosen = StepCache.parse("steps:computed=0x1,num_inference_steps=6").build()
    with pytest.raises(DitAccelError, match="7 steps"):
        chosen.check(7)
    for steps in (6, None):
        chosen.check(steps)
    StepCache.parse("steps:computed=0x1x3").build().check(2)


@pytest.mark.parametrize(("damping", "shares"), [("0", (0, 0, 0)), ("0.5", (0.5, 0.75, 0.875)), ("1", (1, 2, 3))])
def test_reach_is_none_without_damping_and_a_line_with_all_of_it(damping, shares):
    chosen = StepCache.parse(f"steps:computed=0x1,damping={damping}").build()
    assert tuple(chosen.reach(steps) for steps in (1, 2, 3)) == shares


def test_published_ratios():
    assert published()["flux"]["cond"] == pytest.approx(hooks.mag_cache.FLUX_MAG_RATIOS.tolist(), abs=1e-6)
    for name, entry in published().items():
        ratios = mag_ratios(name)
        assert len(ratios.uncond) in (0, len(ratios.cond)) and ratios.cond[0] == 1.0 and entry["source"]
        assert all(0.2 < ratio < 2 for ratio in (*ratios.cond, *ratios.uncond))
    ratios = mag_ratios(None, ("models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/1/transformer",))
    assert ratios == mag_ratios("wan2.1-t2v-1.3b") and ratios.of("uncond") != ratios.of("cond") == ratios.of(
        "cond_uncond"
    )
    assert ratios.of("call 1") == ratios.of("pred_uncond") == ratios.of("uncond")
    assert ratios.of("pred_cond") == ratios.cond
    unknown = mag_ratios(None, ("demo",))
    assert unknown.cond == (ASSUMED,) and "assumed" in unknown.source


@pytest.mark.parametrize("folder", ["Qwen/Qwen-Image", "models--Qwen--Qwen-Image/snapshots/0a1b", "/data/Qwen-Image"])
@pytest.mark.parametrize("end", ["", "/", "/transformer", "/transformer/"])
def test_a_name_may_be_a_folder(folder, end):
    """Another model's begins with the same name."""
    row = next(row for row in FAMILY_ROWS["qwen_image"] if row.models)
    assert mag_ratios(None, (folder + end,)) == mag_ratios("qwen-image") and is_named(row.models, [folder + end])
    other = folder.replace("Qwen-Image", "Qwen-Image-2512") + end
    assert mag_ratios(None, (other,)).cond == (ASSUMED,) and not is_named(row.models, [other])


def test_calibrations_are_saved_and_read(tmp_path):
    ratios = MagRatios((1.0, 0.98, 0.95), (1.0, 0.97, 0.94), source="demo, 3 steps")
    ratios.save(tmp_path / "ratios.json", steps=3)
    assert mag_ratios(str(tmp_path / "ratios.json")) == ratios
    assert dataclasses.replace(ratios, uncond=()).of("uncond") == ratios.cond


@pytest.mark.parametrize("content", ["[]", "{}", '{"cond": []}', '{"cond": ["a"]}', '{"cond": [1, -1]}', "no json"])
def test_a_file_without_ratios_is_refused(tmp_path, content):
    (tmp_path / "ratios.json").write_text(content)
    with pytest.raises(DitAccelError):
        mag_ratios(str(tmp_path / "ratios.json"))


def test_a_missing_file_is_refused_with_the_nearest_published_name():
    with pytest.raises(DitAccelError, match=names("'wan2.1-t2v-1.3b'")):
        mag_ratios("wan2.1-t2v-1.3")


def test_steps_that_begin_in_the_middle_are_counted_among_themselves():
    """Wan 2.2's second transformer."""
    branch = BranchReport("transformer_2", "cond", 1, 3, {4: 1.0, 5: 0.0, 6: 0.0, 7: 0.0})
    assert says(branch.describe(), "3 of its 4", "5-7")


def test_spans():
    assert spans([3, 4, 5, 7, 9, 10]) == "3-5, 7, 9-10" and spans([]) == ""
