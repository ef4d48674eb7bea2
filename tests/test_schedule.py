"""Which steps and layers stay dense."""

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.schedule import Schedule, Step


def dense_steps(schedule: Schedule, count: int) -> list[int]:
    return [index for index in range(count) if schedule.dense_step(Step(index, count))]


@pytest.mark.parametrize(
    ("first", "last", "count", "wanted"),
    [
        (0, 0, 5, []),
        (2, 0, 5, [0, 1]),
        (0, 1, 5, [4]),
        (1, 2, 5, [0, 3, 4]),
        (9, 0, 5, [0, 1, 2, 3, 4]),
        (3, 3, 5, [0, 1, 2, 3, 4]),
        (0.25, 0.0, 8, [0, 1]),
        (0.25, 0.0, 10, [0, 1, 2]),
        (0.01, 0.01, 10, [0, 9]),
        (0.0, 1.0, 3, [0, 1, 2]),
    ],
)
def test_steps_of_a_known_trajectory(first, last, count, wanted):
    assert dense_steps(Schedule(dense_steps=first, dense_last_steps=last), count) == wanted


def test_the_reason_names_the_setting():
    schedule = Schedule(dense_steps=1, dense_last_steps=0.5)
    assert schedule.dense_step(Step(0, 4)) == "dense_steps=1"
    assert schedule.dense_step(Step(1, 4)) is None
    assert schedule.dense_step(Step(3, 4)) == "dense_last_steps=0.5"


def test_shares_of_an_unknown_trajectory_are_shares_of_the_noise():
    schedule = Schedule(dense_steps=0.3, dense_last_steps=0.2)
    dense = [bool(schedule.dense_step(Step(0, None, progress))) for progress in (0.0, 0.29, 0.31, 0.79, 0.81)]
    assert dense == [True, True, False, False, True]


def test_last_steps_of_an_unknown_trajectory_are_refused():
    with pytest.raises(DitAccelError, match=names("set_step")):
        Schedule(dense_last_steps=2).dense_step(Step(0, None, 0.0))


@pytest.mark.parametrize(
    ("layers", "total", "wanted"),
    [
        (0, 4, set()),
        (1, 4, {0}),
        (4, 4, {0, 1, 2, 3}),
        (0.5, 5, {0, 1, 2}),
        (0.01, 4, {0}),
        ((0, 3), 4, {0, 3}),
        ([2], 3, {2}),
    ],
)
def test_layers(layers, total, wanted):
    assert Schedule(dense_layers=layers).layers(total) == wanted


@pytest.mark.parametrize("layers", [5, (4,), (0, 7)])
def test_layers_beyond_the_model_are_refused(layers):
    with pytest.raises(DitAccelError, match=names("dense_layers")):
        Schedule(dense_layers=layers).layers(4)


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, True, "2", None, float("nan")])
@pytest.mark.parametrize("name", ["dense_steps", "dense_last_steps", "dense_layers"])
def test_anything_else_is_refused(name, value):
    with pytest.raises(DitAccelError, match=names(name)):
        Schedule(**{name: value})


@pytest.mark.parametrize("layers", [(1.0,), (-1,), (True,), ("0",)])
def test_layer_indices_are_integers(layers):
    with pytest.raises(DitAccelError, match=names("dense_layers")):
        Schedule(dense_layers=layers)
