"""Recommended settings: what they are at the sizes they were published for, and how they are asked for."""

import copy

import pytest
from diffusers import WanPipeline
from messages import names

import dit_accel
from dit_accel.generation.request import MethodOptions, Subject
from dit_accel.pipelines.levels import Case
from dit_accel.registry import get_families
from dit_accel.schedule import Step
from dit_accel.tokens import TokenGrid


def published(family, method, grid):
    return dit_accel.plan(method, grid, **get_families()[family].recommended[method].config)


def test_radial_presets_attend_the_published_blocks():
    """69 frames of 768x1280 in Wan, 117 in HunyuanVideo; counted by the published code."""
    wan = published("wan", "radial", TokenGrid(18, 48, 80)).block_mask()
    assert (wan.visited, wan.total) == (83728, 540**2)
    hunyuan = published("hunyuan_video", "radial", TokenGrid(30, 48, 80)).block_mask()
    assert (hunyuan.visited, hunyuan.total) == (222452, 900**2)


def test_gna_presets_are_the_published_windows():
    """18x24x24 of 30x48x80 tokens, 91.00 % sparse; 16x32x48 of 16x44x80; 80x80 of 256x256."""
    hunyuan, cosmos, flux = TokenGrid(30, 48, 80), TokenGrid(16, 44, 80), TokenGrid(1, 256, 256)
    assert published("hunyuan_video", "gna", hunyuan).pairs == hunyuan.visual * 18 * 24 * 24
    assert published("cosmos", "gna", cosmos).pairs == cosmos.visual * 16 * 32 * 48
    assert published("flux", "gna", flux).pairs == flux.visual * 80 * 80


def test_a_preset_sets_the_method_and_what_stays_dense(tiny_wan):
    with dit_accel.accelerate(tiny_wan(), "radial", preset=True) as accel:
        assert (accel.setting.config.decay, accel.setting.config.rule, accel.setting.config.sink) == (
            0.2,
            "released",
            True,
        )
        assert (accel.setting.schedule.dense_steps, accel.setting.schedule.dense_layers) == (0.24, 1)
        assert "scripts/wan_t2v_inference.sh" in accel.report().notes[0]


def test_two_transformers_have_settings_of_their_own(wan_folder):
    """Wan 2.2's, at its published 77 frames of 768x1280 in 40 steps; what was published for one counts for the rest."""
    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    with dit_accel.accelerate(pipe, "radial", preset=True) as accel:
        config, schedule = accel.setting.config, accel.setting.schedule
        assert (config.decay, config.block, schedule.dense_layers) == (0.8, 64, 1)
        assert "scripts/wan_22_t2v_inference.sh" in accel.report().notes[0]
        dense = [schedule.dense_step(Step(index, 40)) is not None for index in range(40)]
        assert dense == [True] * 11 + [False] * 29
    with dit_accel.accelerate(pipe, "sla", preset=True) as accel:
        assert (accel.setting.config.topk, accel.setting.config.block_q, accel.setting.config.block) == (0.1, 128, 64)
    pair = Subject(get_families()["wan"], 2, Case("wan", (), True, 1, 40, False))
    setting = MethodOptions(method="radial", preset=True).candidate(lambda: pair).setting
    assert (setting.config.decay, setting.schedule.dense_steps) == (0.8, 11 / 40)


def test_what_is_given_wins(tiny_wan):
    arguments = {"preset": True, "decay": 0.5, "dense_steps": 3, "dense_layers": 0}
    with dit_accel.accelerate(tiny_wan(), "radial", **arguments) as accel:
        assert (accel.setting.config.decay, accel.setting.config.rule) == (0.5, "released")
        assert (accel.setting.schedule.dense_steps, accel.setting.schedule.dense_layers) == (3, 0)


def test_without_a_preset_the_defaults_count(tiny_wan):
    with dit_accel.accelerate(tiny_wan(), "radial") as accel:
        assert accel.setting.config.decay == 1.0
        assert accel.setting.schedule == dit_accel.schedule.Schedule()


def test_no_preset_names_those_that_exist(tiny_wan):
    message = (
        r"No settings of tile are recommended for the family wan "
        r"\(there are some for sol, sparge, rectified, radial, sla\)"
    )
    with pytest.raises(dit_accel.DitAccelError, match=message):
        dit_accel.accelerate(tiny_wan(), "tile", preset=True, references=1)
    with pytest.raises(dit_accel.DitAccelError):
        get_families()["pixart"].preset("radial")


def test_a_preset_without_a_method_is_the_one_to_start_with(tiny_wan):
    with dit_accel.accelerate(tiny_wan(), preset=True, dense_steps=3) as accel:
        assert accel.setting.method == "sol" == get_families()["wan"].first_preset
        assert (accel.setting.config.block_q, accel.setting.schedule.dense_steps) == (128, 3)
    with pytest.raises(dit_accel.DitAccelError, match=names("pixart balanced")):
        _ = get_families()["pixart"].first_preset


def test_a_preset_is_of_one_method(tiny_wan):
    with pytest.raises(dit_accel.DitAccelError, match=names("preset=True balanced sol radial")):
        dit_accel.accelerate(tiny_wan(), "fast", preset=True)
    with pytest.raises(dit_accel.DitAccelError, match=names("preset=True")):
        dit_accel.accelerate(tiny_wan(), "radial", preset=True, layer_schedule="layers.json")
