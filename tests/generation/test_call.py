"""The arguments of a pipeline's call."""

import pytest

from dit_accel.generation import call


class Plain:
    def __call__(self, prompt, num_frames=81): ...


class Rated:
    def __call__(self, prompt, frame_rate=24.0): ...


class Optional:
    def __call__(self, prompt, fps=None): ...


@pytest.mark.parametrize(
    ("pipe", "arguments", "rate"),
    [
        (Plain(), {}, None),
        (Rated(), {}, 24),
        (Rated(), {"frame_rate": 30}, 30),
        (Optional(), {}, None),
        (Optional(), {"fps": 8}, 8),
    ],
)
def test_frames_a_second_are_those_the_call_is_told(pipe, arguments, rate):
    assert call.frame_rate(pipe, arguments) == rate
