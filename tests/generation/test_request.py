"""What generating and evaluating are asked alike."""

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.generation.request import ModelRequest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype int8 float32 bfloat16"),
        ({"fps": 0}, "fps 1 0"),
        ({"fps": 101}, "fps 100 101"),
    ],
)
def test_what_no_option_would_take_is_refused(wrong, message):
    """So that a suite takes no more than the command line does."""
    with pytest.raises(DitAccelError, match=names(message)):
        ModelRequest(**wrong)


def test_arguments_are_those_asked_for_over_the_models_own():
    class Pipe:
        def __call__(self, prompt, height=0, width=0, num_inference_steps=50, guidance_scale=5.0, eta: float = 0.0): ...

    request = ModelRequest(steps=3, pipe=("eta=0.5",))
    defaults = {"num_inference_steps": 16, "guidance_scale": 4.0, "num_frames": 17}
    arguments = request.arguments(Pipe, defaults, (1, 32, 48), video=False, prompt="a fox")
    assert arguments == {
        "prompt": "a fox",
        "height": 32,
        "width": 48,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "eta": 0.5,
    }
