"""Layer search: against brute force, and on a model whose layers differ."""

import dataclasses
import itertools
import json

import pytest
import torch
from messages import names

import dit_accel
from dit_accel import DitAccelError
from dit_accel.methods.gna import METHOD, Config
from dit_accel.setting import Setting
from dit_accel.train import search
from dit_accel.train.data import Dataset
from dit_accel.train.search import Table, budgeted, greedy


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 3, generator=generator)
    return Table("tile", ("a", "b", "c"), (0.25, 0.5, 0.125), tuple(map(tuple, losses.tolist())))


@pytest.mark.parametrize("budget", [0.125, 0.3, 0.5, 0.66, 1.0])
def test_budgeted_is_the_best_of_all_choices(table, budget):
    every = itertools.product((None, 0, 1, 2), repeat=4)
    wanted = min(table.loss(choice) for choice in every if table.cost(choice) <= budget)
    choice = budgeted(table, budget)
    assert table.cost(choice) <= budget and table.loss(choice) == pytest.approx(wanted)


def test_a_budget_that_cannot_be_had(table):
    with pytest.raises(DitAccelError, match=names("0.1250")):
        budgeted(table, 0.1)


def test_greedy_takes_the_cheapest_that_fits():
    table = Table("tile", ("a", "b"), (0.5, 0.25), ((0.1, 0.3), (0.05, 0.1), (0.9, 0.8)))
    assert greedy(table, 0.2) == [0, 1, None]
    assert table.cost([0, 1, None]) == pytest.approx((0.5 + 0.25 + 1) / 3)


def test_on_a_model(tiny, tmp_path):
    """A layer whose output projection is zero gives nothing away; the search finds that out and the file says so."""
    pipe = tiny.load()
    torch.nn.init.zeros_(pipe.transformer.blocks[1].attn1.to_out[0].weight)
    data = Dataset(tiny.data)
    processors = dict(pipe.transformer.attn_processors)
    candidates = [Config(window=(3, 4, 6), causal=(True, False, False)), Config(window=1)]
    table = search.measure(pipe, "gna", candidates, data, samples=2)
    assert pipe.transformer.attn_processors == processors
    assert table.losses[1] == (0, 0) and 0 < table.losses[0][0] < table.losses[0][1]
    grid = dit_accel.TokenGrid(3, 4, 6)
    assert table.costs == tuple(METHOD.plan(grid, candidate).density for candidate in candidates)
    chosen = greedy(table, threshold=1e-12)
    assert chosen == [None, 1]
    path = tmp_path / "schedule.json"
    search.write(path, table, chosen, Setting("gna", layers=table.layers(chosen)), {"threshold": 1e-12})
    assert json.loads(path.read_text())["search"]["density"] == table.cost(chosen)
    with dit_accel.accelerate(pipe, layer_schedule=path) as accel:
        assert accel.setting.layers["transformer"] == (None, table.candidates[1])
    with pytest.raises(DitAccelError, match=names("candidate")):
        search.measure(pipe, "gna", [], data)


def test_shared_results_are_values_of_a_search(tiny):
    """A skipped layer costs a refresh in so many steps; results of a step nearby are nearer than none."""
    pipe, data = tiny.load(), Dataset(tiny.data)
    near = Config(window=1, share="output", refresh=2)
    others = [dataclasses.replace(near, **change) for change in ({"share": "residual"}, {}, {"refresh": 4})]
    candidates = [Config(window=1), *others]
    table = search.measure(pipe, "gna", candidates, data, samples=2, steps=50)
    window = table.costs[0]
    assert table.costs == pytest.approx((window, 0.5 + window, 0.5, 0.25))
    for masked, residual, output, old in table.losses:
        assert 0 < residual < masked and 0 < output < old
