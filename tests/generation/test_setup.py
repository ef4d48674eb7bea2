"""The arguments of a pipeline's call."""

import typing

import pytest
import torch
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.generation import sampling, setup


class Plain:
    def __call__(self, prompt, num_frames=81): ...


class Rated:
    def __call__(self, prompt, frame_rate=24.0): ...


class Many:
    def __call__(
        self,
        prompt,
        prompt_2: str | list[str] | None = None,
        sigmas: list[float] = None,  # noqa: RUF013 - as Diffusers writes it
        timesteps: typing.Optional[typing.List[int]] = None,  # noqa: UP006, UP045 - as Diffusers wrote it
        eta: float = 0.0,
        clean: bool = True,
        extra: dict[str, typing.Any] | None = None,
        other=None,
    ): ...


class Unresolved:
    def __call__(self, prompt, other: "not_installed.Thing" = None): ...  # noqa: F821


class Optional:
    def __call__(self, prompt, fps=None): ...


@pytest.mark.parametrize(
    ("kind", "arguments", "rate"),
    [
        (Plain, {}, None),
        (Rated, {}, 24),
        (Rated, {"frame_rate": 30}, 30),
        (Optional, {}, None),
        (Optional, {"fps": 8}, 8),
    ],
)
def test_frames_a_second_are_those_the_call_is_told(kind, arguments, rate):
    assert setup.default_of(kind, arguments, "frame_rate", "fps") == rate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("prompt_2=a fox", "a fox"),
        ("prompt_2=7", "7"),  # a number is no prompt
        ('prompt_2=["a", "b"]', ["a", "b"]),
        ("prompt_2=null", None),
        ("sigmas=[1, 0.5]", [1, 0.5]),
        ("sigmas=null", None),
        ("timesteps=[999, 1]", [999, 1]),
        ("eta=1", 1),
        ("clean=false", False),
        ('extra={"scale": 0.5}', {"scale": 0.5}),
        ("other=[1]", [1]),
    ],
)
def test_values_are_of_the_kind_that_the_call_takes(text, value):
    arguments = setup.call_arguments(Many, {}, {"prompt": "p"}, [text])
    name = text.partition("=")[0]
    assert arguments == {"prompt": "p", name: value} and type(arguments[name]) is type(value)


@pytest.mark.parametrize("text", ["sigmas=[a]", "sigmas=[true]", "timesteps=[0.5]", "eta=none", "clean=1", "extra=[]"])
def test_values_of_another_kind_are_refused(text):
    with pytest.raises(DitAccelError, match=names("--pipe", text.partition("=")[0], "Many", "JSON")):
        setup.call_arguments(Many, {}, {"prompt": "p"}, [text])


def test_what_an_annotation_names_need_not_be_installed():
    assert setup.call_arguments(Unresolved, {}, {"prompt": "p"}, ["other=1"])["other"] == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_one_line(error):
    def pipe(**arguments):
        raise error

    with pytest.raises(DitAccelError, match=names("--vae-tiling")):
        sampling.call(pipe, {}, seed=0)


def test_other_errors_of_a_call_keep_their_traceback():
    def pipe(**arguments):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        sampling.call(pipe, {}, seed=0)
