import numpy as np
import pytest

from dit_accel.pipelines.demo import DEFAULTS
from tools.demo.checker import read
from tools.demo.evaluate import fixed_scenes, summarise, true_clips


def test_true_clips_are_read_and_shuffled_captions_give_chance():
    true, shuffled = true_clips(DEFAULTS, count=200)
    assert true["colour"] >= 0.98
    assert true["direction"] >= 0.98
    assert true["joint"] >= 0.98
    assert true["shape"] >= 0.95
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


def test_noise_is_not_mistaken_for_motion():
    video = np.random.default_rng(0).random((17, 32, 32, 3))
    assert read(video).direction is None


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="one video"):
        read(np.zeros((1, 9, 32, 32, 3)))


def test_the_fixed_prompts_are_balanced_and_half_held_out():
    shown = fixed_scenes(40)
    assert len(set(shown)) == 40
    assert sum(scene.held_out for scene in shown) == 20
    for direction in ("right", "left", "up", "down"):
        assert sum(scene.direction == direction for scene in shown) == 10
    assert fixed_scenes(8) == shown[:8]


def test_the_number_of_prompts_is_checked():
    with pytest.raises(ValueError, match="from 1 to"):
        fixed_scenes(0)


def test_summary_counts_colour_and_direction_together():
    rows = [
        {"colour": True, "direction": True, "background": True, "shape": False},
        {"colour": True, "direction": False, "background": True, "shape": True},
    ]
    shares = summarise(rows)
    assert (shares["colour"], shares["direction"], shares["joint"], shares["all"]) == (1.0, 0.5, 0.5, 0.0)
