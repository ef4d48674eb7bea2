"""A learned method with an objective of its own is one file outside the package: `tests/methods/outside/gained.py`."""

import pathlib
import sys

import pytest
import torch

import dit_accel
from dit_accel import methods, registry
from dit_accel.train import state
from dit_accel.train.settings import make

OUTSIDE = pathlib.Path(__file__).parent.parent / "methods" / "outside"


@pytest.fixture(autouse=True)
def gained(monkeypatch):
    """The method is known for one test."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(OUTSIDE)])
    registry.get_methods.cache_clear()
    yield
    registry.get_methods.cache_clear()
    for name in ("gained", "nearest"):
        sys.modules.pop(f"dit_accel.methods.{name}", None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_objective_trains_its_weights_and_nothing_else(trained, tiny, checkpointing):
    """The loss falls, the gains are saved and come back, and the model's weights stay."""
    folder = trained(
        method="gained", config={"start": 0.5}, objectives={"unit": 1.0}, rate=0.05, steps=12,
        checkpointing=checkpointing,
    )  # fmt: skip
    losses = [row["unit"] for row in state.read_losses(folder / "losses.jsonl")]
    assert losses[-1] < 0.95 * losses[0]
    pipe = tiny.load()
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    with dit_accel.load(pipe, folder) as accel:
        gains = [module.weight for module in accel.learned_weights().values()]
        assert len(gains) == 2 and all((gain > 0.5).all() for gain in gains)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.state_dict().items())


def test_its_objective_joins_those_of_every_method(trained):
    rows = state.read_losses(
        trained(method="gained", config={}, objectives={"teacher": 1.0, "unit": 0.1}) / "losses.jsonl"
    )
    assert set(rows[0]) == {"step", "loss", "rate", "teacher", "unit"}


def test_other_methods_do_not_have_its_objective():
    with pytest.raises(dit_accel.DitAccelError, match="gna"):
        make({"method": "gna", "config": {"window": 3}, "objectives": {"unit": 1.0}})


def test_the_command_line_shows_it(cli):
    assert "unit" in cli("ls", "gained").out
