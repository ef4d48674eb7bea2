"""Evaluations written down in YAML."""

import itertools

import pytest

from dit_accel.errors import DitAccelError
from dit_accel.eval import suite
from dit_accel.values import names_in


def read(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    return suite.read(str(tmp_path / "s.yaml"))


def test_values(tmp_path):
    found = read(
        tmp_path,
        "model: demo\ncompile: false\nseeds: [0, 2]\nguidance: 5\nmethods:\n  - gna:window=0.5\n"
        "  - {method: 'radial:decay=0.2', dense_steps: 2, dense_layers: [0, 3]}\n"
        "  - {method: tile:references=1, dense_layers: [5]}\n",
    )
    one, other, third = found.pop("methods")
    assert found == {"model": "demo", "compile": False, "seeds": (0, 2), "guidance": 5.0}
    assert (one.title, other.title) == ("gna:window=0.5", "radial:decay=0.2")
    assert other.label == "radial:decay=0.2 dense_steps=2 dense_layers=0,3"
    assert third.setting.schedule.dense_layers == (5,)  # that layer, not as many layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: demo", "no setting 'modle'. Did you mean 'model'?"),
        ("steps: many", "steps is a whole number or none, got 'many'"),
        ("steps: true", "steps is a whole number or none, got True"),
        ("seeds: [0, x]", "seeds is a list, each a whole number, got (0, 'x')"),
        ("steps: 1\nsteps: 2", "steps is there twice"),
        ("methods: [{method: gna, dense_steps: 1, dense_steps: 2}]", "dense_steps is there twice"),
        ("[" * 100_000, "nests too deep"),
        (
            "a: &a [0, 0]\n"
            + "".join(f"{k}: &{k} [*{j}, *{j}]\n" for j, k in itertools.pairwise("abcdefghijklmnopqrstu")),
            "unfold to more than 100,000",
        ),
        ("methods: &m [*m]", "unfold to more than"),
        ("- demo", "should hold keys and values"),
        ("model: [", "is not YAML"),
        ("methods: [gnaa]", "Did you mean 'gna'?"),
        ("steps: -1", "steps is at least 1, got -1"),
        ("methods: [{method: gna, window: 2}]", "has method or load among the keys method, load"),
        ("methods: [{dense_steps: 2}]", "has method or load among"),
        ("methods: [3]", "got 3"),
        ("methods: [{method: gna:window=2, dense_steps: many}]", "dense_steps is an int >= 0"),
    ],
)
def test_refused(tmp_path, text, message):
    with pytest.raises(DitAccelError) as error:
        read(tmp_path, text)
    assert message in str(error.value)


def test_missing():
    with pytest.raises(DitAccelError, match=r"Did you mean 'demo'\?"):
        suite.read("dmo")


@pytest.mark.parametrize("name", names_in(suite.SUITES))
def test_built_in_suites_are_whole(name):
    found = suite.read(name)
    methods = {"gna", "tile", "sol", "sparge", "rectified"}
    assert {candidate.method for candidate in found["methods"]} == methods
