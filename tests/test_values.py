"""Settings as dataclasses: kinds, limits and conversions from plain values."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from messages import says

from dit_accel import values
from dit_accel.errors import DitAccelError
from dit_accel.values import option


@dataclasses.dataclass(frozen=True)
class Inner:
    share: float = option(0.5, "A share.", least=0, below=1)

    def __post_init__(self) -> None:
        values.check(self)


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int | None = option(None, "Steps.", least=1, most=9)
    rate: float = option(1e-4, "Rate.", above=0)
    names: tuple[str, ...] = option((), "Names.", repeatable=True)
    some: tuple[str, ...] | None = None
    layers: int | tuple[int, ...] = 0
    place: Path | None = None
    kind: Literal["a", "b"] = "a"
    free: dict[str, Any] = option({}, "Anything.")
    inner: Inner = option(Inner, "Nested.")

    def __post_init__(self) -> None:
        values.check(self)


def test_plain_values_take_the_kinds_of_the_fields():
    plain = {"rate": 1, "names": "x", "some": "y", "layers": [1, 2], "place": "a/b", "free": {"w": [1, 2]}}
    settings = values.build(Settings, plain | {"inner": {"share": 0}}, "This")
    assert (settings.rate, type(settings.rate)) == (1.0, float)
    assert (settings.names, settings.some, settings.layers) == (("x",), ("y",), (1, 2))
    assert (settings.place, settings.free, settings.inner) == (Path("a/b"), {"w": (1, 2)}, Inner(0.0))
    assert values.build(Settings, {"layers": 3}, "This").layers == 3
    assert values.record(settings)["place"] == "a/b"


def test_instances_share_no_default():
    Settings().free["a"] = 1
    assert Settings().free == {}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"stepz": 1}, "'stepz' 'steps'"),
        (3, "settings 3"),
        ({"steps": 0}, "steps 1 0"),
        ({"steps": 10}, "steps 9 10"),
        ({"steps": True}, "steps True"),
        ({"rate": 0}, "rate 0 0.0"),
        ({"rate": float("nan")}, "rate nan"),
        ({"kind": "c"}, "kind a, b 'c'"),
        ({"names": [1]}, "names (1,)"),
        ({"inner": {"share": 1}}, "share 1 1.0"),
        ({"inner": {"other": 1}}, "inner 'other'"),
    ],
)
def test_refused(plain, message):
    with pytest.raises(DitAccelError) as error:
        values.build(Settings, plain, "This")
    assert says(str(error.value), message)


def test_names_on_the_command_line():
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert values.flag(fields["steps"]) == "--steps"
