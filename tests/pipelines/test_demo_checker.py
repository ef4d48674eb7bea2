from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import names

from dit_accel.pipelines.demo import DEFAULTS, clips
from dit_accel.pipelines.demo.checker import count_pieces, named, read
from dit_accel.pipelines.demo.clips import Scene
from tools.demo.evaluate import fixed_scenes, summarise, true_clips


def test_true_clips_are_read_and_shuffled_captions_give_chance():
    true, shuffled = true_clips(replace(DEFAULTS, height=96, width=96), count=200)
    assert true["all"] >= 0.99
    assert abs(shuffled["colour"] - 1 / 6) < 0.1
    assert abs(shuffled["direction"] - 1 / 4) < 0.1


def test_nothing_moving_reads_as_no_object():
    reading = read(np.zeros((9, 32, 32, 3)))
    assert reading.background == "black"
    assert (reading.colour, reading.shape, reading.direction) == (None, None, None)


def test_an_object_at_rest_has_no_direction():
    video = np.zeros((9, 32, 32, 3))
    video[:, 8:20, 8:20] = (0.9, 0.12, 0.12)
    reading = read(video)
    assert (reading.colour, reading.shape, reading.direction) == ("red", "square", None)


def test_an_object_in_pieces_and_a_second_one_are_not_whole():
    clip = clips.render([Scene("red", "circle", "right", "blue")], 9, 64, 64, torch.Generator().manual_seed(0))
    whole = clip[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    assert read(whole).objects == 1
    broken, doubled = whole.copy(), whole.copy()
    rows = np.flatnonzero((whole[4] != whole[4, 0, 0]).any((1, 2)))
    broken[4, rows.mean().astype(int)] = whole[4, 0, 0]  # one line of one frame
    doubled[2, 2:8, 2:8] = whole[4, 32, 32]
    for video in (broken, doubled):
        assert read(video).objects == 2
        agreement = read(video).agrees(Scene("red", "circle", "right", "blue"))
        assert agreement["colour"] and not agreement["whole"]
        assert summarise([agreement])["all"] == 0


def test_pieces_are_counted():
    mask = np.zeros((8, 12), bool)
    assert count_pieces(mask) == 0
    mask[1:7, 1] = mask[1:7, 5] = mask[6, 1:6] = True  # a U: two arms that meet below
    assert count_pieces(mask) == 1
    mask[0, 6] = True  # touches a corner
    assert count_pieces(mask) == 1
    mask[2:5, 9:11] = True
    assert count_pieces(mask) == 2
    big = np.zeros((64, 64), bool)
    big[:32] = big[60, 60] = True  # a speck
    assert count_pieces(big) == 1


def test_noise_is_not_mistaken_for_motion():
    video = np.random.default_rng(0).random((17, 32, 32, 3))
    assert read(video).direction is None


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match=names("video")):
        read(np.zeros((1, 9, 32, 32, 3)))


def test_the_fixed_prompts_are_balanced_and_half_held_out():
    shown = fixed_scenes(40)
    assert len(set(shown)) == 40
    assert sum(scene.held_out for scene in shown) == 20
    for direction in ("right", "left", "up", "down"):
        assert sum(scene.direction == direction for scene in shown) == 10
    assert fixed_scenes(8) == shown[:8]


def test_the_number_of_prompts_is_checked():
    with pytest.raises(ValueError, match=names("1")):
        fixed_scenes(0)


def test_summary_counts_colour_and_direction_together():
    rows = [
        {"colour": True, "direction": True, "background": True, "shape": False, "whole": True},
        {"colour": True, "direction": False, "background": True, "shape": True, "whole": True},
    ]
    shares = summarise(rows)
    assert (shares["colour"], shares["direction"], shares["joint"], shares["all"]) == (1.0, 0.5, 0.5, 0.0)


def test_a_prompt_names_what_it_says():
    every = [scene for held_out in (True, False) for scene in clips.scenes(held_out)]
    for scene in every:
        for phrase in (clips.CAPTION, *clips.PARAPHRASES):
            assert named(scene.phrase(phrase)) == vars(scene)
    assert named("A red, round circle!") == {"colour": "red", "shape": "circle"}
    assert named("a blue background") == {"background": "blue"}
    assert named("background") == {}


def test_a_video_follows_what_its_prompt_names():
    clip = clips.render([Scene("red", "circle", "right", "blue")], 9, 64, 64, torch.Generator().manual_seed(0))
    reading = read(clip[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5)
    assert reading.follows("a red circle moves right on a blue background")
    assert reading.follows("a circle")
    for wrong in ("a red square", "a green circle", "a red circle moves left", "a red circle on a gray background"):
        assert not reading.follows(wrong)
    assert not replace(reading, objects=2).follows("a circle")
