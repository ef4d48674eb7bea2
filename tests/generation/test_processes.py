"""Which part of the work a process does."""

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.generation.processes import VARIABLES, ProcessRank


@pytest.fixture
def environment(monkeypatch):
    """Sets RANK, WORLD_SIZE and LOCAL_RANK, or removes them."""

    def put(*values):
        for name, value in zip(VARIABLES, values, strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return put


def test_as_the_launcher_says(environment):
    environment(None, None, None)
    assert ProcessRank.here() == ProcessRank(0, 1) and ProcessRank.here().main
    environment("3", "4", "1")
    assert ProcessRank.here() == ProcessRank(3, 4, 1) and not ProcessRank.here().main


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("3", "3", "0"), "RANK 0"),
        ((None, "3", "0"), "WORLD_SIZE"),
        (("one", "3", "0"), "WORLD_SIZE"),
    ],
)
def test_what_does_not_fit_is_refused(environment, values, message):
    environment(*values)
    with pytest.raises(DitAccelError, match=names(message)):
        ProcessRank.here()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_of_it_in_order(count):
    parts = [ProcessRank(index, count).share(range(5)) for index in range(count)]
    assert [item for part in parts for item in part] == list(range(5))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ProcessRank(5, 8, 1).device("auto") == "cuda:1"
    assert ProcessRank(5, 8, 1).device("cpu") == "cpu"
    assert ProcessRank().device("auto") == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ProcessRank(5, 8, 1).device("auto") == "auto"
